"""The training-only head that maps a model's features to those of a frozen encoder.

REPA: Representation Alignment for Generation (Yu et al., arXiv 2410.06940). Tokenizers whose released files include the
head own it; the loss itself is ``losses.alignment``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from torch import nn

from vistok.types import as_dataclass


@dataclass(frozen=True)
class AlignmentConfig:
    """A head for the loss "repa". None takes the default of the model.

    Attributes:
        dim: channels of the frozen encoder: 768 for DINOv2-B, 1024 for DINOv2-L.
        layer: the layer whose features the head reads; each model says how it counts.
        num_layers, hidden_dim: number of linear layers of the head, and width of the hidden ones.
    """

    dim: int | None = None
    layer: int | None = None
    num_layers: int = 3
    hidden_dim: int | None = None

    def tap(self, layers: range) -> int:
        """The layer whose features the head reads. Raises ValueError if it is not among ``layers``."""
        if self.layer is None or self.layer not in layers:
            raise ValueError(f"alignment.layer must lie in {layers.start}..{layers.stop - 1}, got {self.layer}")
        return self.layer

    @classmethod
    def filled(cls, given: Self | Mapping[str, Any] | None, **own: int) -> Self | None:
        """The ``given`` config with the model's ``own`` values in place of None; None for no head."""
        if given is None:
            return None
        values = asdict(as_dataclass(cls, given))
        return cls(**{key: own[key] if value is None and key in own else value for key, value in values.items()})


class AlignmentHead(nn.Sequential):
    """Linear layers with SiLU between: (..., dim) -> (..., out_dim).

    Args:
        dim: width of the features.
        hidden_dim: width of the hidden layers.
        out_dim: width of the frozen encoder's features.
        num_layers: linear layers.
    """

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, num_layers: int = 3):
        widths = [dim, *[hidden_dim] * (num_layers - 1)]
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
        super().__init__(*hidden, nn.Linear(widths[-1], out_dim))

    @classmethod
    def of(cls, dim: int, config: AlignmentConfig) -> Self:
        """Build the head of a complete config. Raises ValueError if ``dim`` or ``hidden_dim`` is None."""
        if config.hidden_dim is None or config.dim is None:
            raise ValueError(f"an alignment head needs dim and hidden_dim, got {config}")
        return cls(dim, config.hidden_dim, config.dim, config.num_layers)
