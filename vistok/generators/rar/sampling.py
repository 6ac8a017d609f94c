"""Sampling of RAR in raster order, where some tokens may be known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistok.draws import Draws
from vistok.generators.engine.autoregressive import AutoregressiveSession
from vistok.generators.engine.compiled import SessionSteps
from vistok.generators.engine.sampling import DecodingOptions
from vistok.types import Condition

if TYPE_CHECKING:
    from vistok.generators.rar.model import RAR


class RARSession(AutoregressiveSession):
    """Cached sampling in which some tokens may be known.

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
        self._known = None if known is None else tuple(part.to(device) for part in known)
        super().__init__(model, condition, options, draws)

    def _draw(self, position: int) -> Tensor:
        drawn = super()._draw(position)
        if self._known is None:
            return drawn
        ids, kept = self._known
        return torch.where(kept[:, position], ids[:, position], drawn)

    def _compiled_steps(self) -> SessionSteps | None:
        return super()._compiled_steps() if self._known is None else None  # compiled steps draw every token
