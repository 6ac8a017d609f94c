"""Residual quantization over growing grids with one shared codebook: next-scale tokens.

VAR: Tian et al., arXiv 2404.02905, section 3.2 and algorithms 1 and 2.

A map is coded on grids of growing size. Each grid codes the residual of the smaller ones: the residual is averaged down
to the grid; its nearest codes are scaled up again, refined by a convolution, and subtracted. The ids of all grids form
one sequence, smallest grid first, in raster order inside a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws
from vistok.nn.containers import ModuleList
from vistok.quantizers.vq import VectorQuantizer
from vistok.types import Expander, QuantizerOutput, check_growth
from vistok.utils.devices import without_autocast

Grid = tuple[int, int]
NO_SHARE = 1e-6
"""Refiners of at most this share are left out."""


def as_grids(scales: Sequence[int | Sequence[int]]) -> tuple[Grid, ...]:
    """Scales, given as sides of squares or as (height, width), as (height, width) grids.

    Raises:
        ValueError: no scales, sides that are not whole numbers of at least 1, or scales that are not ordered from small
            to large.
    """
    given = scales if isinstance(scales, list | tuple) else ()
    sides = [tuple(scale) if isinstance(scale, list | tuple) else (scale, scale) for scale in given]
    if not sides or any(len(grid) != 2 or not all(type(side) is int and side >= 1 for side in grid) for grid in sides):
        raise ValueError(f"scales must be sides or (height, width) pairs, whole numbers of at least 1, got {scales!r}")
    return check_growth(tuple((height, width) for height, width in sides))


def refiner_of_scales(num_scales: int, num_refiners: int) -> tuple[int, ...]:
    """The index of the convolution that each scale uses: scale k takes the tick nearest to k / (num_scales - 1).

    The K = ``num_refiners`` ticks lie evenly from a to 1 - a, with a = 1 / (2 K), but 1 / (3 K) for K = 4; the first of
    equals wins. Computed in double precision, whose rounding breaks some ties (scales 2 and 7 of ten, for K = 4): the
    released weights were trained with these choices.
    """
    margin = 1 / (3 if num_refiners == 4 else 2) / num_refiners
    ticks = np.linspace(margin, 1 - margin, num_refiners)
    return tuple(int(np.abs(ticks - k / max(num_scales - 1, 1)).argmin()) for k in range(num_scales))


class Refiner(nn.Conv2d):
    """(1 - share) x + share conv3x3(x), (B, C, h, w) -> same."""

    def __init__(self, channels: int, share: float):
        super().__init__(channels, channels, 3, padding=1)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, super().forward(x), self.share)


class MultiScaleQuantizer(nn.Module):
    """Quantize a map (B, D, h, w) on growing grids; the last one is that of the map.

    Args:
        codebook_size: number of codes K, shared by all scales.
        dim: channels D of a code.
        scales: grids, smallest first: sides of squares, or (height, width).
        num_refiners: number of convolutions that the scales share (``refiner_of_scales``).
        refiner_share: weight of the convolution against the plain map, see ``Refiner``; 0 leaves all of them out.
        cosine: choose codes by cosine similarity. The codes that are returned and subtracted are not normalised.
        restart_after: training steps after which an unused code is moved onto a residual; 0 turns this off.

    Raises:
        ValueError: invalid scales, ``num_refiners`` below 1, or a ``refiner_share`` outside [0, 1].
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        scales: Sequence[int | Sequence[int]],
        *,
        num_refiners: int = 4,
        refiner_share: float = 0.5,
        cosine: bool = False,
        restart_after: int = 0,
    ):
        super().__init__()
        self.scales = as_grids(scales)
        if not 0 <= refiner_share <= 1:
            raise ValueError(f"refiner_share must lie in [0, 1], got {refiner_share}")
        if num_refiners < 1:
            raise ValueError(f"num_refiners must be at least 1, got {num_refiners}; refiner_share=0 leaves them out")
        self.codebook = VectorQuantizer(
            codebook_size, dim, normalize=cosine, init="uniform", restart_after=restart_after
        )
        count = num_refiners if refiner_share > NO_SHARE else 0
        self.refiners = ModuleList(Refiner(dim, refiner_share) for _ in range(count))

    @property
    def codebook_size(self) -> int:
        return self.codebook.codebook_size

    @property
    def dim(self) -> int:
        return self.codebook.dim

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("codebook", "commitment")

    def codes(self) -> Tensor:
        """All codes (K, D), not normalised."""
        return self.codebook.embedding.weight

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of ids (...): what a scale contributes before it is scaled up and refined."""
        return self.codebook.embedding(ids)

    # -----------------------------------------------------------------------------------------------------------------
    # From a map to ids

    def levels(self, latents: Tensor, scales: Sequence[Grid] | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each scale the residual on its grid (B, n, D), its ids (B, n), and the map so far (B, D, h, w).

        Args:
            scales: grids to use instead of the quantizer's own; the last is that of the map.

        Raises:
            ValueError: the last scale is not the map's.
        """
        grids = self._grids(scales)
        if latents.shape[-2:] != grids[-1]:
            raise ValueError(
                f"the scales end at {grids[-1]}, but the map is {tuple(latents.shape[-2:])}: the last scale must be "
                "the whole map"
            )
        rest, so_far = latents.detach().float(), torch.zeros_like(latents, dtype=torch.float32)
        for k, grid in enumerate(grids):
            vectors = rearrange(_averaged(rest, grid), "b d h w -> b (h w) d")
            ids = self.codebook.encode(vectors)
            part = self.enlarge(self.ids_to_latents(ids), k, grids)
            so_far, rest = so_far + part, rest - part.detach()
            yield vectors, ids, so_far

    def encode(self, latents: Tensor, scales: Sequence[Grid] | None = None) -> Tensor:
        """Ids (B, L) of the scales of maps (B, D, h, w), computed in float32 even under autocast."""
        with without_autocast(latents.device):
            return torch.cat([ids for _, ids, _ in self.levels(latents, scales)], 1)

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize maps (B, D, h, w). ``quantized`` is a map too; loss terms are (B, h * w), means over the scales.

        The gradient of ``quantized`` reaches only the latents. Codes and refiners learn from the term "codebook", which
        compares the map after every scale with the latents. ``draws`` is unused.
        """
        with without_autocast(latents.device):
            latents = latents.float()
            levels = list(self.levels(latents))
            ids = torch.cat([ids for _, ids, _ in levels], 1)
            maps = torch.stack([so_far for _, _, so_far in levels])  # (S, B, D, h, w)
            losses = {
                "codebook": (maps - latents.detach()).pow(2).mean((0, 2)).flatten(1),
                "commitment": (maps.detach() - latents).pow(2).mean((0, 2)).flatten(1),
            }
            if self.training and self.codebook.restart is not None:
                self.codebook.restart(torch.cat([vectors for vectors, _, _ in levels], 1), ids)
            quantized = latents + (maps[-1] - latents).detach()
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)

    # -----------------------------------------------------------------------------------------------------------------
    # From ids to maps

    def enlarge(self, codes: Tensor, k: int, scales: Sequence[Grid] | None = None) -> Tensor:
        """What scale ``k`` adds to the map: codes (B, n, D) on its grid, scaled up bicubically and refined."""
        grids = self._grids(scales)
        x = rearrange(codes, "b (h w) d -> b d h w", h=grids[k][0])
        if k < len(grids) - 1:
            x = F.interpolate(x, size=grids[-1], mode="bicubic")
        if not self.refiners:
            return x
        return self.refiners[refiner_of_scales(len(grids), len(self.refiners))[k]](x)

    def maps(self, tokens: Tensor, scales: Sequence[Grid] | None = None) -> Iterator[Tensor]:
        """Yield the sum (B, D, h, w) of the scales so far, after each scale.

        Args:
            tokens: ids (B, n) or code vectors (B, n, D) of the first scales, or of all.

        Raises:
            ValueError: the tokens end within a scale.
        """
        grids = self._grids(scales)
        codes = tokens if tokens.is_floating_point() else self.ids_to_latents(tokens)
        so_far: float | Tensor = 0.0
        for k, part in enumerate(codes.split(whole_scales(codes.shape[1], grids), 1)):
            so_far = so_far + self.enlarge(part, k, grids)
            yield so_far

    def decode(self, tokens: Tensor, scales: Sequence[Grid] | None = None) -> Tensor:
        """The map (B, D, h, w) of ids (B, n) or code vectors (B, n, D) of the first scales, or of all."""
        *_, last = self.maps(tokens, scales)
        return last

    def next_input(self, so_far: Tensor, grid: Grid) -> Tensor:
        """The map so far, averaged down to the next grid."""
        return _averaged(so_far, grid)

    def _grids(self, scales: Sequence[Grid] | None) -> tuple[Grid, ...]:
        return self.scales if scales is None else as_grids(scales)


def whole_scales(count: int, grids: Sequence[Grid]) -> list[int]:
    """The sizes of the first scales, which have ``count`` tokens together.

    Raises:
        ValueError: ``count`` is 0, too large, or ends within a scale.
    """
    sizes, sums = [math.prod(grid) for grid in grids], np.cumsum([math.prod(grid) for grid in grids]).tolist()
    if count not in sums:
        raise ValueError(
            f"{count} tokens end within a scale: the scales end at {', '.join(map(str, sums))} tokens of the whole"
        )
    return sizes[: sums.index(count) + 1]


def _averaged(x: Tensor, grid: Grid) -> Tensor:
    """A map (B, D, h, w) averaged over the cells of a grid."""
    return x if x.shape[-2:] == grid else F.interpolate(x, size=grid, mode="area")


class QuantizesScales(Protocol):
    """A quantizer on growing grids with one id per position, as a next-scale generator needs it."""

    scales: tuple[Grid, ...]

    def codes(self) -> Tensor:
        """All code vectors (K, D)."""

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of ids (...)."""

    def enlarge(self, codes: Tensor, k: int) -> Tensor:
        """What scale ``k`` adds to the map (B, D, h, w): codes (B, n, D) on its grid."""

    def maps(self, tokens: Tensor) -> Iterator[Tensor]:
        """The map (B, D, h, w) after each scale of ids (B, n) or code vectors (B, n, D)."""

    def next_input(self, so_far: Tensor, grid: Grid) -> Tensor:
        """The map (B, D, h, w) after a scale as the generator reads it on the next grid."""


class ScaleExpander(Expander):
    """Makes the inputs of a next-scale generator: for each scale, the sum of the smaller scales on its grid.

    The first scale, of n tokens, has no input: a whole sequence (B, L) gives inputs (B, L - n, D).

    Attributes:
        so_far: the sum (B, D, h, w) of the scales that ``step`` was given; None before the first.
    """

    def __init__(self, quantizer: QuantizesScales):
        self._quantizer, self._seen = quantizer, 0
        self.so_far: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """All code vectors (K, D)."""
        return self._quantizer.codes()

    @torch.no_grad()
    def expand(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.codes.device)
        maps = list(self._quantizer.maps(tokens))
        none = maps[0].new_zeros(len(maps[0]), 0, maps[0].shape[1])  # a single scale has no input
        return torch.cat([none, *(self._input(so_far, k) for k, so_far in enumerate(maps[:-1]))], 1)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Inputs (B, m, D) of the next scale, from ids (B, n) or code vectors (B, n, D) of this one. After the last
        scale m is 0."""
        tokens = tokens.to(self.codes.device)
        codes = tokens if tokens.is_floating_point() else self._quantizer.ids_to_latents(tokens)
        part = self._quantizer.enlarge(codes, self._seen)
        self.so_far = part if self.so_far is None else self.so_far + part
        self._seen += 1
        if self._seen == len(self._quantizer.scales):
            return part.new_zeros(len(part), 0, part.shape[1])
        return self._input(self.so_far, self._seen - 1)

    def _input(self, so_far: Tensor, k: int) -> Tensor:
        """The map after scale k on the grid of the next one, (B, n, D)."""
        return rearrange(self._quantizer.next_input(so_far, self._quantizer.scales[k + 1]), "b d h w -> b (h w) d")
