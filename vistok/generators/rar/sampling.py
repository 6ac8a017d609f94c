"""Sampling of RAR: raster order, with a guidance that grows along the sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistok.draws import Draws
from vistok.generators.engine.autoregressive import AutoregressiveSession
from vistok.generators.engine.sampling import DecodingOptions
from vistok.types import Condition

if TYPE_CHECKING:
    from vistok.generators.rar.model import RAR


@dataclass(frozen=True)
class RAROptions(DecodingOptions):
    """As of ``DecodingOptions``, and:

    Attributes:
        guidance_power: the scale rises from 1 to ``guidance_scale`` as (1 - cos(pi (k / L)^power)) / 2 over the
            positions k of L (the schedule "power-cosine" of the reference); None keeps it as ``DecodingOptions`` does.

    Raises:
        ValueError: a negative power, or one with a pair of scales.
    """

    guidance_power: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_power is None:
            return
        if self.guidance_power < 0:
            raise ValueError(f"guidance_power must be 0 (constant) or more, got {self.guidance_power}")
        if not isinstance(self.guidance_scale, int | float):
            raise ValueError(f"guidance_power needs one guidance_scale, got {self.guidance_scale}")

    def guidance_scales(self, length: int) -> list[float]:
        if self.guidance_power is None:
            return super().guidance_scales(length)
        start, stop = self.guidance_interval or (0, length)
        scales = power_cosine(self.guidance_scale, self.guidance_power, length)
        return [scale if start <= position < stop else 1.0 for position, scale in enumerate(scales)]


def power_cosine(scale: float, power: float, length: int) -> list[float]:
    """The scale of each of ``length`` positions; with power 0 it is constant (0^0 is 1)."""
    shares = [(1 - math.cos(math.pi * (position / length) ** power)) / 2 for position in range(length)]
    return [(scale - 1) * share + 1 for share in shares]


class RARSession(AutoregressiveSession):
    """Cached sampling, where the class modulates every position, and some tokens may be known.

    Args:
        known: ids (B, L) and a mask (B, L) bool, True where the id takes the place of the drawn one.
    """

    def __init__(
        self,
        model: RAR,
        condition: Condition,
        options: DecodingOptions,
        draws: Draws | None,
        known: tuple[Tensor, Tensor] | None = None,
    ):
        device = model.output.weight.device
        rows = condition.with_null() if options.guided else condition
        with torch.no_grad():
            self._class_vector = model.class_vector(rows.to(device))
        self._known = None if known is None else tuple(part.to(device) for part in known)
        super().__init__(model, condition, options, draws)

    def _draw(self, position: int) -> Tensor:
        drawn = super()._draw(position)
        if self._known is None:
            return drawn
        ids, kept = self._known
        return torch.where(kept[:, position], ids[:, position], drawn)

    @torch.inference_mode()
    def _advance(self, x: Tensor) -> Tensor:
        start, stop = self.cache.length, self.cache.length + x.shape[1]
        where, mask = slice(start, stop), self._mask(start, stop)
        hidden = self.model.transform(x, where, mask, self.cache.layers, self._class_vector)
        return self.model.head(hidden[:, -1])
