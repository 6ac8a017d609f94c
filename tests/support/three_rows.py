"""Guidance of three rows, for models of one condition: the given one, another one, and none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.conditions import PARTS, Condition
from vistok.guidance import Guidance, constant

A, B = 2.5, -0.75
WEIGHTS = (A, B, 1 - A - B)


@dataclass(frozen=True)
class ThreeRows(Guidance):
    """Rows of a condition, of ``other`` and of nothing, with the weights ``WEIGHTS``."""

    other: Condition | None = None

    def conditions(self, condition: Condition) -> Condition:
        return Condition.cat(self.separate(condition))

    def separate(self, condition: Condition) -> list[Condition]:
        return [condition, self.other, condition.null()]


def three_rows(other: Condition | None = None) -> ThreeRows:
    return ThreeRows(((), PARTS, PARTS), (constant(A), constant(A + B)), other=other)


def with_three_rows(options: type, other: Condition) -> type:
    """An options type whose guidance has three rows."""

    @dataclass(frozen=True)
    class Options(options):
        @property
        def guidance(self) -> Guidance:
            return three_rows(other)

    return Options


def combined(passes: list[Tensor]) -> Tensor:
    """The combination of three passes."""
    return torch.stack([weight * one for weight, one in zip(WEIGHTS, passes, strict=True)]).sum(0)
