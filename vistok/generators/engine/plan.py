"""The steps and the order in which the tokens of an image are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


def check_orders(orders: Tensor, length: int, rows: int | None = None) -> Tensor:
    """Return ``orders`` (B, L) if each is a permutation of the places 0 .. length - 1.

    Args:
        rows: the required number of orders; None allows any number.

    Raises:
        ValueError: another dtype or shape, or no permutations. On an accelerator the values are checked by an
            asynchronous assertion on the device, because reading them would synchronise.
    """
    wanted = f"({'B' if rows is None else rows}, {length})"
    if orders.is_floating_point() or orders.dtype == torch.bool:
        raise ValueError(f"an order names places by integers, got {orders.dtype}")
    if orders.ndim != 2 or orders.shape[1] != length or (rows is not None and len(orders) != rows):
        raise ValueError(f"orders must be {wanted}, one of all tokens each; got {tuple(orders.shape)}")
    whole = (orders.sort(1).values == torch.arange(length, device=orders.device)).all()
    message = (
        f"an order names each of the places 0..{length - 1} once; got {tuple(orders.shape)} that are no permutations"
    )
    if orders.device.type != "cpu":
        torch._assert_async(whole, message)
    elif not bool(whole):
        raise ValueError(message)
    return orders


@dataclass(frozen=True)
class Plan:
    """The steps of a sample: each generates the tokens of one or several places.

    Attributes:
        order: (1 or B, L) int64, the places of all tokens in the order of generation, for all rows or for each.
        sizes: the number of tokens of each step.
        is_raster: whether tokens are generated in the order of their places.
        bounds: step i generates the tokens [bounds[i], bounds[i + 1]) of the order.

    Raises:
        ValueError: step sizes below 1, or that do not sum to L.
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
        """(1 or B, n) int64, the places of the tokens of a step."""
        return self.order[:, self.bounds[step] : self.bounds[step + 1]]

    def step_at(self, count: int) -> int | None:
        """The step that begins after ``count`` tokens; None if they end within a step."""
        return self.bounds.index(count) if count in self.bounds else None


def in_order(values: Tensor, orders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raster values (B, L) rearranged into ``orders`` (B, L), and these orders; None is raster order.

    Raises:
        ValueError: orders that are not one permutation for each row.
    """
    if orders is None:
        return values, torch.arange(values.shape[1], device=values.device).expand(values.shape)
    return values.gather(1, check_orders(orders, values.shape[1], len(values))), orders


def in_places(values: Tensor, order: Tensor) -> Tensor:
    """Values (B, L, ...) in the order of generation (1 or B, L), rearranged into raster order."""
    back = order.argsort(1).expand(len(values), -1)
    return values.take_along_dim(back.view(*back.shape, *[1] * (values.ndim - 2)), 1)
