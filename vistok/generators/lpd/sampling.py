"""Options of LPD's sampling, and the published group sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vistok.generators.engine.queries import QueryOptions

PUBLISHED = {
    (256, 20): (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20),
    (256, 32): (1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 10, 11, 11, 11, 11, *(12,) * 8),
}
"""Group sizes by (number of tokens, number of steps)."""

OrderName = Literal["locality", "random"]


@dataclass(frozen=True)
class LPDOptions(QueryOptions):
    """``QueryOptions`` with an order of the places.

    Attributes:
        order: "locality" chooses places of a group near known tokens and far from one another, "random" any places.
            None is "locality" for tokens on a raster, else "random".
        proximity_threshold, repulsion_threshold: of "locality", see ``locality_order``.

    Raises:
        ValueError: an unknown order, or a threshold that is negative or not finite.
    """

    order: OrderName | None = None
    proximity_threshold: float = 1.0
    repulsion_threshold: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (None, *get_args(OrderName)):
            raise ValueError(f"order must be 'locality' or 'random', got {self.order!r}")
        for name in ("proximity_threshold", "repulsion_threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
