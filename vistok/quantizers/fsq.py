"""Finite scalar quantization: every channel is rounded to one of a few levels, without a codebook.

Paper: Finite Scalar Quantization: VQ-VAE Made Simple (Mentzer et al., arXiv 2309.15505).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.types import QuantizerOutput

MARGIN = 1.001  # the bounded range is a little wider than the outermost levels, so that they can be reached


class FSQ(nn.Module):
    """Round latents (..., D) to a grid of ``levels[d]`` values in each channel d.

    A latent z is bounded, b = tanh(z + atanh(o / h)) h - o, with h = (L - 1) 1.001 / 2 and o = 1/2 for even L, else 0;
    rounded to the nearest integer; and divided by L // 2, which gives codes in [-1, 1]. An even number of levels has no
    code at 1. Ids number the codes with the first channel varying fastest. There are no weights and no loss terms.

    Args:
        levels: number of values of each channel, at least 2.

    Raises:
        ValueError: no channels, or fewer than 2 levels in one.
    """

    sizes: Tensor
    half_width: Tensor
    basis: Tensor

    loss_terms: tuple[str, ...] = ()

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least one channel, and at least 2 levels in each; got levels {levels}")
        self.levels = tuple(int(n) for n in levels)
        self.codebook_size, self.dim = math.prod(self.levels), len(self.levels)
        sizes = torch.tensor(self.levels)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("half_width", sizes // 2, persistent=False)
        basis = [math.prod(self.levels[:d]) for d in range(self.dim)]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, latents: Tensor) -> Tensor:
        """Latents (..., D) squashed into the range that rounds to the levels; float32."""
        half = (self.sizes - 1) * MARGIN / 2
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        return torch.tanh(latents.float() + torch.atanh(offset / half)) * half - offset

    def continuous(self, latents: Tensor) -> Tensor:
        """The codes (..., D) that latents would have without rounding."""
        return self.bound(latents) / self.half_width

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (...) of latents (..., D)."""
        return self._ids(self.bound(latents).round())

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) in [-1, 1], float32, of ids (...)."""
        digits = ids.unsqueeze(-1) // self.basis % self.sizes
        return (digits - self.half_width) / self.half_width

    def latents_to_ids(self, codes: Tensor) -> Tensor:
        """Ids (...) of codes (..., D), the inverse of ``ids_to_latents``."""
        return self._ids((codes.float() * self.half_width).round())

    def neighbours(self, latents: Tensor, k: int) -> Tensor:
        """Ids (..., k) of the k codes nearest to latents (..., D), nearest first, by distance between codes.

        The squared distance is a sum over channels, so the k best codes extend the k best choices of earlier channels:
        channels are added one by one, without a table of all codes.

        Raises:
            ValueError: there are fewer than k codes.
        """
        if not 1 <= k <= self.codebook_size:
            raise ValueError(f"k must lie in 1..{self.codebook_size}, the number of codes; got {k}")
        points = self.continuous(latents)
        cost, ids = points.new_zeros(*points.shape[:-1], 1), torch.zeros_like(points[..., :1], dtype=torch.int64)
        for channel, size in enumerate(self.levels):
            digits = torch.arange(size, device=points.device)
            values = (digits - size // 2) / (size // 2)
            added = (points[..., channel, None] - values).square()  # (..., L)
            total = (cost.unsqueeze(-1) + added.unsqueeze(-2)).flatten(-2)
            candidates = (ids.unsqueeze(-1) + digits * self.basis[channel]).flatten(-2)
            cost, kept = total.topk(min(k, total.shape[-1]), dim=-1, largest=False)
            ids = candidates.gather(-1, kept)
        return ids

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D) with a straight-through gradient for the rounding; ``draws`` is unused."""
        bounded = self.bound(latents)
        rounded = bounded.round()
        quantized = (bounded + (rounded - bounded).detach()) / self.half_width
        return QuantizerOutput(quantized, self._ids(rounded), {}, self.codebook_size)

    def _ids(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self.half_width) * self.basis).sum(-1)
