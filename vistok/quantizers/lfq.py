"""Lookup-free quantization: a code is the vector of its latent's signs, without a codebook.

Paper: Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (Yu et al., arXiv 2310.05737), section 3.1;
conventions of Open-MAGVIT2 (arXiv 2409.04410).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.losses.entropy import BitEntropyLoss
from vistok.types import QuantizerOutput


class LFQ(nn.Module):
    """Replace each channel of latents (..., D) by its sign: 2^D codes of +-1; 0 becomes -1.

    The id counts 2^c for each channel c that is positive: the first channel is the lowest bit. There are no weights.

    Args:
        dim: channels D, the bits of an id.
        entropy_temperature: temperature of the "entropy" term (``BitEntropyLoss``); None leaves the term out.
        position_weight, usage_weight: weights of its two entropies, see ``EntropyLoss``.

    Raises:
        ValueError: ``dim`` outside 1..62.
    """

    basis: Tensor

    def __init__(
        self,
        dim: int,
        *,
        entropy_temperature: float | None = 0.01,
        position_weight: float = 1.0,
        usage_weight: float = 1.0,
    ):
        super().__init__()
        if not 1 <= dim <= 62:
            raise ValueError(f"a code has 1 to 62 bits, got dim {dim}")
        self.dim, self.codebook_size = dim, 2**dim
        weights = {"position_weight": position_weight, "usage_weight": usage_weight}
        self.entropy = None if entropy_temperature is None else BitEntropyLoss(entropy_temperature, **weights)
        self.register_buffer("basis", 2 ** torch.arange(dim), persistent=False)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("commitment", *(("entropy",) if self.entropy else ()))

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (...) of latents (..., D)."""
        return ((latents > 0) * self.basis).sum(-1)

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D), +-1 in float32, of ids (...)."""
        return (ids.unsqueeze(-1).bitwise_and(self.basis) > 0).float() * 2 - 1

    def neighbours(self, latents: Tensor, k: int) -> Tensor:
        """Ids (..., k) of the k codes nearest to latents (..., D), nearest first.

        Flipping the sign of channel c adds 4 |z_c| to the squared distance, so the k cheapest sets of flips are found
        channel by channel, without a table of all codes.

        Raises:
            ValueError: there are fewer than k codes.
        """
        if not 1 <= k <= self.codebook_size:
            raise ValueError(f"k must lie in 1..{self.codebook_size}, the number of codes; got {k}")
        cost, flips = torch.zeros_like(latents[..., :1]), torch.zeros_like(latents[..., :1], dtype=torch.int64)
        for bit, price in enumerate((4 * latents.abs()).unbind(-1)):
            cost = torch.cat([cost, cost + price[..., None]], -1)
            flips = torch.cat([flips, flips + 2**bit], -1)
            cost, kept = cost.topk(min(k, cost.shape[-1]), dim=-1, largest=False)
            flips = flips.gather(-1, kept)
        return self.encode(latents)[..., None].bitwise_xor(flips)

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D) with a straight-through gradient; ``draws`` is unused."""
        ids = self.encode(latents)
        codes = self.ids_to_latents(ids).to(latents.dtype)
        losses = {"commitment": (latents - codes).float().square().mean(-1)}
        if self.entropy is not None:
            losses["entropy"] = self.entropy(latents)
        quantized = latents + (codes - latents).detach()
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)
