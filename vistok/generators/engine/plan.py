"""In which steps, and in which order, the tokens of an image are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """The steps of a sample: each is a set of places, one or several.

    Attributes:
        order: (1 or B, L) int64, the places of all tokens in the order of generation, the same in all rows or not.
        sizes: how many tokens each step generates.
        is_raster: whether tokens are generated in the order of their places.
        bounds: step i generates the tokens bounds[i] to bounds[i + 1] of the order.

    Raises:
        ValueError: steps that have other than all tokens.
    """

    order: Tensor
    sizes: tuple[int, ...]
    is_raster: bool = False
    bounds: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if sum(self.sizes) != self.order.shape[1] or min(self.sizes) < 1:
            raise ValueError(f"steps of {self.sizes} tokens do not make the {self.order.shape[1]} there are")
        object.__setattr__(self, "bounds", (0, *accumulate(self.sizes)))

    @classmethod
    def raster(cls, length: int) -> Self:
        """One token after another, in the order of their places."""
        return cls(torch.arange(length)[None], (1,) * length, is_raster=True)

    def to(self, device: torch.device) -> Plan:
        return Plan(self.order.to(device), self.sizes, self.is_raster)

    @property
    def is_single(self) -> bool:
        """Whether every step generates one token."""
        return len(self.sizes) == self.order.shape[1]

    def __len__(self) -> int:
        return len(self.sizes)

    def places(self, step: int) -> Tensor:
        """(1 or B, n), where the tokens of a step lie."""
        return self.order[:, self.bounds[step] : self.bounds[step + 1]]

    def step_at(self, count: int) -> int | None:
        """The step that begins after ``count`` tokens; None in the middle of one."""
        return self.bounds.index(count) if count in self.bounds else None


def in_order(values: Tensor, orders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values (B, L) by place in an order (B, L), and that order; None is raster order.

    Raises:
        ValueError: an order that is not one of all places.
    """
    if orders is None:
        return values, torch.arange(values.shape[1], device=values.device).expand(values.shape)
    if orders.shape != values.shape:
        raise ValueError(f"orders must be {tuple(values.shape)}, one of all tokens each; got {tuple(orders.shape)}")
    return values.gather(1, orders), orders


def in_places(values: Tensor, order: Tensor) -> Tensor:
    """Values (B, L, ...) of tokens in order (1 or B, L) at the places of these tokens."""
    back = order.argsort(1).expand(len(values), -1)
    return values.take_along_dim(back.view(*back.shape, *[1] * (values.ndim - 2)), 1)
