"""Multi-scale quantization of sequences (B, L, D) that are a latent map in raster order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws, Keys
from vistok.losses.entropy import BitEntropyLoss
from vistok.quantizers.bsq import MultiScaleBSQ
from vistok.quantizers.lfq import LFQ
from vistok.quantizers.multiscale import Grid, MultiScaleQuantizer, ScaleExpander, as_grids, whole_scales
from vistok.types import DrawsInTraining, QuantizerOutput, TokenSpec
from vistok.utils.devices import without_autocast


class PackedBSQ(nn.Module, DrawsInTraining):
    """``MultiScaleBSQ`` of images, with the bits of a position packed into one id as in ``LFQ``.

    Bitwise self-correction (Infinity, arXiv 2412.04431, section 3.3): training flips random bits. Later scales code the
    error too, so that the decoder, or a generator (``BitExpander.correct``), sees repaired mistakes.

    Args:
        dim: channels D, the bits of an id.
        scales: grids, smallest first: sides of squares, or (height, width).
        decay: as in ``MultiScaleBSQ``.
        entropy_temperature: temperature of the "entropy" term over the normalised residuals of all scales, as in
            ``BSQ``; None leaves the term out.
        position_weight, usage_weight: weights of its two entropies, see ``EntropyLoss``.
        self_correction: largest flip probability of a bit. A probability is drawn for each batch and scale, in
            hundredths from 0 to this value (0.3 in the paper); 0 flips none.
        corrected_scales: number of scales with flips, from the smallest; None is all.

    Raises:
        ValueError: more bits than an id can hold, invalid scales, or a probability outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        scales: Sequence[int | Sequence[int]],
        *,
        decay: bool = False,
        entropy_temperature: float | None = None,
        position_weight: float = 1.0,
        usage_weight: float = 1.0,
        self_correction: float = 0.0,
        corrected_scales: int | None = None,
    ):
        super().__init__()
        if not 0 <= self_correction <= 1:
            raise ValueError(f"self_correction is a probability in [0, 1], got {self_correction}")
        weights = {"position_weight": position_weight, "usage_weight": usage_weight}
        self.packing = LFQ(dim, entropy_temperature=None)
        self.scales = as_grids(scales)
        if corrected_scales is not None and not 0 <= corrected_scales <= len(self.scales):
            raise ValueError(f"corrected_scales must lie in 0..{len(self.scales)}, got {corrected_scales}")
        self.bits = MultiScaleBSQ(dim, self.scales, decay=decay)
        self.entropy = None if entropy_temperature is None else BitEntropyLoss(entropy_temperature, **weights)
        self.dim, self.codebook_size, self.self_correction = dim, self.packing.codebook_size, self_correction
        self.corrected_scales = len(self.scales) if corrected_scales is None else corrected_scales

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy else ()

    def codes(self) -> Tensor:
        """All codes (K, D), of length one."""
        return self.ids_to_latents(torch.arange(self.codebook_size, device=self.packing.basis.device))

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D), of length one, of ids (...)."""
        return self.packing.ids_to_latents(ids) / math.sqrt(self.dim)

    def pack(self, bits: Tensor) -> Tensor:
        """Ids (B, L) of bits (B, L, D)."""
        return (bits.long() * self.packing.basis).sum(-1)

    # -----------------------------------------------------------------------------------------------------------------

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (B, L) of maps (B, D, h, w), computed in float32 even under autocast."""
        with without_autocast(latents.device):
            return self.pack(self.bits.encode(latents.float()))

    def training_draws(self, keys: Keys, length: int) -> Draws:
        """ "flips" and "strengths" of self-correction, where it is on."""
        return self.bits.correction_draws(keys) if self.self_correction else {}

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize maps (B, D, h, w). The ids are those of the quantized map, in training with flipped bits.

        Args:
            draws: from ``training_draws``, needed in training with ``self_correction``.

        Raises:
            ValueError: draws are missing, or maps of another shape.
        """
        flips = None
        if self.training and self.self_correction:
            if not draws or "flips" not in draws:
                raise ValueError("self-correction turns random bits in training: pass draws of training_draws")
            flips = self._flips(draws)
        with without_autocast(latents.device):
            levels = list(self.bits.levels(latents.float(), flips))
            losses = {}
            if self.entropy is not None:
                units = [F.normalize(level.residual, dim=1).flatten(2).transpose(1, 2) for level in levels]
                losses["entropy"] = self.entropy(torch.cat(units, 1) / math.sqrt(self.dim))
        bits = torch.cat([level.bits for level in levels], 1)
        ids = self.pack(bits if flips is None else bits ^ flips)
        return QuantizerOutput(levels[-1].so_far.view(latents.shape), ids, losses, self.codebook_size)

    def _flips(self, draws: Draws) -> Tensor:
        """(B, L, D) bool, True where a bit is flipped."""
        strengths = self.bits.drawn_strengths(draws, self.self_correction, self.corrected_scales)
        sizes = torch.tensor([math.prod(grid) for grid in self.scales], device=strengths.device)
        return draws["flips"] < strengths.repeat_interleave(sizes)[:, None]

    # -----------------------------------------------------------------------------------------------------------------
    # From ids to maps

    def enlarge(self, codes: Tensor, k: int) -> Tensor:
        """What scale ``k`` adds to the map (B, D, h, w): codes (B, n, D) on its grid, scaled up."""
        grid = rearrange(codes, "b (h w) d -> b d 1 h w", h=self.scales[k][0])
        return self.bits.enlarged(grid, k).squeeze(2)

    def maps(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield the sum (B, D, h, w) of the scales so far, after each scale.

        Args:
            tokens: ids (B, n) or code vectors (B, n, D) of the first scales, or of all.

        Raises:
            ValueError: the tokens end within a scale.
        """
        codes = tokens if tokens.is_floating_point() else self.ids_to_latents(tokens)
        so_far: float | Tensor = 0.0
        for k, part in enumerate(codes.split(whole_scales(codes.shape[1], self.scales), 1)):
            so_far = so_far + self.enlarge(part, k)
            yield so_far

    def decode(self, tokens: Tensor) -> Tensor:
        """The map (B, D, h, w) of tokens as in ``maps``."""
        *_, last = self.maps(tokens)
        return last

    def next_input(self, so_far: Tensor, grid: Grid) -> Tensor:
        """The map so far, resized to the next grid without antialiasing, as the released transformer reads it."""
        return so_far if so_far.shape[-2:] == grid else F.interpolate(so_far, size=grid, mode="bilinear")


class ScaledQuantizer(nn.Module, DrawsInTraining):
    """Applies a multi-scale quantizer of maps (B, D, h, w) to latents (B, h * w, D).

    Ids (B, L) are those of all scales, smallest first; ``ids_to_latents`` returns the sum of the scales.

    Args:
        of_maps: the quantizer; its last grid is the raster of the latents.
    """

    def __init__(self, of_maps: MultiScaleQuantizer | PackedBSQ):
        super().__init__()
        self.of_maps = of_maps

    @property
    def scales(self) -> tuple[Grid, ...]:
        return self.of_maps.scales

    @property
    def dim(self) -> int:
        return self.of_maps.dim

    @property
    def codebook_size(self) -> int:
        return self.of_maps.codebook_size

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return self.of_maps.loss_terms

    def training_draws(self, keys: Keys, length: int) -> Draws:
        return self.of_maps.training_draws(keys, length) if isinstance(self.of_maps, DrawsInTraining) else {}

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (B, L) of latents (B, h * w, D)."""
        return self.of_maps.encode(self._map(latents))

    def ids_to_latents(self, tokens: Tensor) -> Tensor:
        """The sum (B, h * w, D) of the scales.

        Args:
            tokens: ids (B, n) or code vectors (B, n, D) of the first scales, or of all.

        Raises:
            ValueError: the tokens end within a scale.
        """
        return rearrange(self.of_maps.decode(tokens), "b d h w -> b (h w) d")

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, h * w, D)."""
        output = self.of_maps(self._map(latents), draws=draws)
        return dataclasses.replace(output, quantized=rearrange(output.quantized, "b d h w -> b (h w) d"))

    def expander(self) -> ScaleExpander:
        of_maps = self.of_maps
        return BitExpander(of_maps) if isinstance(of_maps, PackedBSQ) else ScaleExpander(of_maps)

    def spec_of(self, spec: TokenSpec) -> TokenSpec:
        """The TokenSpec of all scales, for a tokenizer whose latents ``spec`` describes.

        Raises:
            ValueError: the last scale is not the raster of the latents, or the tokenizer decodes prefixes.
        """
        last = self.scales[-1]
        if spec.prefix_step is not None:
            raise ValueError(
                "prefixes of ordered tokens decode, and a scale is spread over all: take a quantizer of one grid"
            )
        if math.prod(last) != spec.length or (spec.grid is not None and spec.grid != last):
            where = f"on a grid of {spec.grid}" if spec.grid is not None else "in a row: end with (1, their number)"
            raise ValueError(
                f"the scales end at {last}, but there are {spec.length} latents {where}: the last scale must be the "
                "whole map"
            )
        return TokenSpec(sum(map(math.prod, self.scales)), self.codebook_size, self.dim, scales=self.scales)

    def _map(self, latents: Tensor) -> Tensor:
        return rearrange(latents, "b (h w) d -> b d h w", h=self.scales[-1][0])


class BitExpander(ScaleExpander):
    """Makes the inputs of a next-scale generator and, from flipped bits, its inputs and targets of self-correction."""

    def __init__(self, quantizer: PackedBSQ):
        super().__init__(quantizer)
        self._packed = quantizer

    @torch.no_grad()
    def correct(self, latents: Tensor, draws: Mapping[str, Tensor] | None, most: float) -> tuple[Tensor, Tensor]:
        packed = self._packed
        latents = rearrange(latents.float(), "b (h w) d -> b d h w", h=packed.scales[-1][0])
        latents = latents.to(packed.packing.basis.device)
        length, count = sum(map(math.prod, packed.scales)), len(packed.scales)
        flips, strengths = latents.new_ones(len(latents), length, packed.dim), latents.new_zeros(count)
        if draws is not None:
            flips, strengths = draws["flips"], packed.bits.drawn_strengths(dict(draws), most, count)
        found = packed.bits.self_correct(latents, flips, strengths)
        return found.inputs, packed.pack(found.targets)


def spec_of(quantizer: nn.Module, spec: TokenSpec) -> TokenSpec:
    """The TokenSpec of a quantizer on latents that ``spec`` describes: ``spec`` itself unless there are scales."""
    return quantizer.spec_of(spec) if isinstance(quantizer, ScaledQuantizer) else spec
