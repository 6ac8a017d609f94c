"""Binary spherical quantization over growing grids: every channel of a code is one bit.

Infinity: Han et al., arXiv 2412.04431, sections 3.1 to 3.3. Binary spherical quantization: Zhao et al., arXiv
2406.07548. Conventions: github.com/FoundationVision/Infinity (MIT).

A code is a vector of d values +-1 / sqrt(d), which has length one; there is no codebook. The bits of all grids form one
sequence (B, L, d), smallest grid first, in raster order inside a grid: every position has d ids, each 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws, Keys
from vistok.types import QuantizerOutput, check_growth
from vistok.utils.devices import without_autocast

Grid3 = tuple[int, int, int]
Resize = Literal["area", "trilinear"]
MOST_FLIPS = 100
"""Flip probabilities are drawn as multiples of 1 / MOST_FLIPS."""


@dataclass(frozen=True)
class BitLevel:
    """The quantization of one scale.

    Attributes:
        residual: (B, D, t, h, w) on the grid, before it is normalised.
        bits: (B, t * h * w, D) bool, of the residual.
        so_far: the map (B, D, T, H, W) after this scale.
    """

    residual: Tensor
    bits: Tensor
    so_far: Tensor


@dataclass(frozen=True)
class Corrected:
    """Training data with flipped bits (bitwise self-correction, section 3.3).

    Attributes:
        inputs: (B, l, E) of all scales but the first: the map so far, made from partly flipped bits.
        targets: (B, L, E) bool: the bits of the true residual, which repair the flips of earlier scales.
        flipped: (B, L', D) bool: the bits with flips, before positions are grouped into patches.
    """

    inputs: Tensor
    targets: Tensor
    flipped: Tensor


def as_boxes(scales: Sequence[Sequence[int]]) -> tuple[Grid3, ...]:
    """Grids, given as (height, width) or (time, height, width), as (time, height, width).

    Raises:
        ValueError: no grids, sides that are not whole numbers of at least 1, or grids that are not ordered from small
            to large.
    """
    given = scales if isinstance(scales, list | tuple) and all(isinstance(s, list | tuple) for s in scales) else ()
    sides = [(1, *scale) if len(scale) == 2 else tuple(scale) for scale in given]
    if not sides or any(len(box) != 3 or not all(type(side) is int and side >= 1 for side in box) for box in sides):
        raise ValueError(
            f"scales must be (height, width) or (time, height, width), whole numbers of at least 1, got {scales!r}"
        )
    return check_growth(tuple((t, h, w) for t, h, w in sides))


class MultiScaleBSQ(nn.Module):
    """Quantize a map (B, D, h, w) on growing grids to signs; the last grid is that of the map. It has no weights.

    Each grid codes the residual of the smaller ones: the residual is averaged down to the grid and l2-normalised; the
    signs of its channels are the code, which is scaled up trilinearly and subtracted.

    The gradient is straight-through for the signs, and exact for the normalisation and both resizings. The codes that
    are subtracted from the residual are detached, so every scale passes its gradient to the latents.

    Args:
        dim: channels D, bits of a position.
        scales: grids, smallest first, as (height, width) or (time, height, width).
        decay: weight the code of scale k by max(0.1, 1 - 0.1 k).
    """

    loss_terms: tuple[str, ...] = ()
    codebook_size = 2

    def __init__(self, dim: int, scales: Sequence[Sequence[int]], *, decay: bool = False):
        super().__init__()
        if dim < 1:
            raise ValueError(f"a code needs at least one bit, got dim {dim}")
        self.dim, self.scales, self.decay = dim, as_boxes(scales), decay

    # -----------------------------------------------------------------------------------------------------------------
    # From a map to bits

    def levels(self, latents: Tensor, flips: Tensor | None = None) -> Iterator[BitLevel]:
        """Yield the level of each scale, smallest first.

        Args:
            flips: (B, L, D) bool, True where a bit is flipped before its code is subtracted, so that the residual of
                later scales holds the error; None flips none.

        Raises:
            ValueError: a map of other channels, or not of the last grid.
        """
        x = self._checked(latents)
        turned = None if flips is None else flips.split([math.prod(box) for box in self.scales], 1)
        residual, so_far = x, torch.zeros_like(x)
        for k in range(len(self.scales)):
            on_grid = self._shrunk(residual, k)
            unit = F.normalize(on_grid, dim=1)
            code = self._signs(unit > 0 if turned is None else (unit > 0) ^ self._gridded(turned[k], k))
            part = self.enlarged(unit + (code - unit).detach(), k)
            residual, so_far = residual - part.detach(), so_far + part
            yield BitLevel(on_grid, _sequence(unit > 0), so_far)

    def encode(self, latents: Tensor) -> Tensor:
        """Bits (B, L, D) int64 of maps (B, D, h, w)."""
        return torch.cat([level.bits for level in self.levels(latents)], 1).long()

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize maps (B, D, h, w) to ``quantized`` maps and ``ids`` (B, L, D) of 0 and 1; there are no losses."""
        with without_autocast(latents.device):
            levels = list(self.levels(latents.float()))
        ids = torch.cat([level.bits for level in levels], 1).long()
        return QuantizerOutput(levels[-1].so_far.view(latents.shape), ids, {}, 2)

    @torch.no_grad()
    def near_zero(self, latents: Tensor, threshold: float) -> Tensor:
        """(S,), the share of the residual's components at each scale with an absolute value below ``threshold``: bits
        that noise can flip."""
        return torch.stack([(level.residual.abs() < threshold).float().mean() for level in self.levels(latents)])

    # -----------------------------------------------------------------------------------------------------------------
    # From bits to maps

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of bits (..., D)."""
        return self._signs(ids > 0)

    def maps(self, bits: Tensor) -> Iterator[Tensor]:
        """Yield the sum (B, D, T, H, W) of the scales so far, after each scale.

        Args:
            bits: (B, n, D) of the first scales, or of all.

        Raises:
            ValueError: another number of channels, or bits that end within a scale.
        """
        sizes = [math.prod(box) for box in self.scales]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        if bits.ndim != 3 or bits.shape[2] != self.dim or bits.shape[1] not in ends:
            raise ValueError(f"bits must be (B, n, {self.dim}), n of {ends}: whole scales; got {tuple(bits.shape)}")
        so_far: float | Tensor = 0.0
        for k, part in enumerate(bits.split(sizes[: ends.index(bits.shape[1]) + 1], 1)):
            so_far = so_far + self.enlarged(self._signs(self._gridded(part, k) > 0), k)
            yield so_far

    def decode(self, bits: Tensor) -> Tensor:
        """The sum of the codes (B, D, h, w), or (B, D, T, H, W) of clips, of bits (B, n, D)."""
        *_, last = self.maps(bits)
        return last.squeeze(2)

    def next_inputs(self, bits: Tensor, *, resize: Resize = "trilinear", patch: int = 1) -> Tensor:
        """What a transformer reads before each scale but the first: the map so far on that scale's grid, (B, l, E).

        Args:
            bits: (B, L, D) of all scales.
            resize: "trilinear" without antialiasing, as in training and sampling of the released transformer; or
                "area", as in the reference's quantizer.
            patch: group p x p neighbouring positions into one, (B, l / p^2, D p^2).

        Raises:
            ValueError: as in ``maps``, or grids that p does not divide.
        """
        return self._inputs(list(self.maps(bits)), resize, patch)

    def _inputs(self, maps: Sequence[Tensor], resize: Resize, patch: int) -> Tensor:
        """``next_inputs`` from the maps after each scale; the last map is no input."""
        none = maps[0].new_zeros(len(maps[0]), 0, self.dim * patch**2)  # a single scale has no input
        before = enumerate(maps[: len(self.scales) - 1])
        return torch.cat([none, *(grouped(_resized(m, self.scales[k + 1], resize), patch) for k, m in before)], 1)

    # -----------------------------------------------------------------------------------------------------------------
    # Bitwise self-correction

    def correction_draws(self, keys: Keys) -> Draws:
        """See ``correction_draws``."""
        return correction_draws(keys, sum(map(math.prod, self.scales)), self.dim, len(self.scales))

    def drawn_strengths(self, draws: Draws, most: float, num_scales: int) -> Tensor:
        """(S,) flip probability of each scale: hundredths from 0 to ``most``; 0 after the first ``num_scales``."""
        strengths = (draws["strengths"][0] * (math.floor(MOST_FLIPS * most + 1e-9) + 1)).floor() / MOST_FLIPS
        return torch.where(torch.arange(len(strengths), device=strengths.device) < num_scales, strengths, 0.0)

    @torch.no_grad()
    def self_correct(
        self, latents: Tensor, flips: Tensor, strengths: Tensor, *, requantize: bool = True, patch: int = 1
    ) -> Corrected:
        """Inputs and targets of a transformer that learns to repair its own mistakes.

        Args:
            latents: maps (B, D, h, w).
            flips: (B, L, D) uniform numbers: a bit is flipped where its number is below the strength of its scale.
            strengths: (S,) in [0, 1].
            requantize: make the map of the flipped codes, so that later scales repair them. If False, the map is made
                of the original codes.
            patch: as in ``next_inputs``.

        Raises:
            ValueError: draws of another shape, or as in ``next_inputs``.
        """
        x, sizes = self._checked(latents), [math.prod(box) for box in self.scales]
        if flips.shape != (len(x), sum(sizes), self.dim) or len(strengths) != len(sizes):
            raise ValueError(
                f"flips must be ({len(x)}, {sum(sizes)}, {self.dim}) and strengths ({len(sizes)},), got "
                f"{tuple(flips.shape)} and {tuple(strengths.shape)}"
            )
        so_far, maps, targets, flipped = torch.zeros_like(x), [], [], []
        for k, draws in enumerate(flips.split(sizes, 1)):
            bits = F.normalize(self._shrunk(x - so_far, k), dim=1) > 0
            turned = bits ^ self._gridded(draws < strengths[k], k)
            so_far = so_far + self.enlarged(self._signs(turned if requantize else bits), k)
            maps.append(so_far)
            targets.append(grouped(bits.float(), patch) > 0)
            flipped.append(_sequence(turned))
        return Corrected(self._inputs(maps, "trilinear", patch), torch.cat(targets, 1), torch.cat(flipped, 1))

    # -----------------------------------------------------------------------------------------------------------------

    def _checked(self, latents: Tensor) -> Tensor:
        """A map as (B, D, T, H, W)."""
        x = latents[:, :, None] if latents.ndim == 4 else latents
        if x.ndim != 5 or x.shape[1] != self.dim or tuple(x.shape[2:]) != self.scales[-1]:
            raise ValueError(
                f"the scales end at {self.scales[-1]} and codes have {self.dim} channels, but the map is "
                f"{tuple(latents.shape)}: the last scale must be the whole map"
            )
        return x

    def _signs(self, bits: Tensor) -> Tensor:
        return torch.where(bits, 1.0, -1.0) / math.sqrt(self.dim)

    def _shrunk(self, x: Tensor, k: int) -> Tensor:
        return _resized(x, self.scales[k], "area")

    def enlarged(self, code: Tensor, k: int) -> Tensor:
        """What scale k adds to the map (B, D, T, H, W): codes (B, D, t, h, w) on its grid, scaled up."""
        part = _resized(code, self.scales[-1], "trilinear")
        return part * max(0.1, 1 - 0.1 * k) if self.decay else part

    def _gridded(self, sequence: Tensor, k: int) -> Tensor:
        t, h, _ = self.scales[k]
        return rearrange(sequence, "b (t h w) d -> b d t h w", t=t, h=h)


def correction_draws(keys: Keys, length: int, dim: int, num_scales: int) -> Draws:
    """ "flips" (B, L, D) uniform; "strengths" (B, S) uniform, with equal rows.

    Self-correction draws one strength per scale for the whole batch. The strengths are keyed by the step alone, so they
    depend on no sample, and all processes draw the same.
    """
    strengths = keys.at((0,)).uniform("strengths", num_scales).expand(len(keys), -1)
    return {"flips": keys.uniform("flips", length, dim), "strengths": strengths}


def _sequence(x: Tensor) -> Tensor:
    return rearrange(x, "b d t h w -> b (t h w) d")


def _resized(x: Tensor, box: Grid3, mode: Resize) -> Tensor:
    return x if tuple(x.shape[2:]) == box else F.interpolate(x, size=box, mode=mode)


def grouped(x: Tensor, patch: int) -> Tensor:
    """A map (B, D, t, h, w) as a sequence (B, t h w / p^2, D p^2), each position being p x p neighbours: channel d,
    row y, column x is at index d p^2 + y p + x.

    Raises:
        ValueError: p does not divide the sides.
    """
    if x.shape[3] % patch or x.shape[4] % patch:
        raise ValueError(f"patches of {patch} do not divide a grid of {x.shape[3]}x{x.shape[4]}")
    return rearrange(x, "b d t (h p) (w q) -> b (t h w) (d p q)", p=patch, q=patch)
