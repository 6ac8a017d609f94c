"""The rows of conditions in the batch of a guided model, and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vistok.conditions import PARTS, Condition
from vistok.guidance.combinations import PLAIN, Combination, Weights
from vistok.guidance.schedules import Schedule, constant, linear, linear_done, named, within

Parts = tuple[str, ...]
"""The parts of the condition that a row drops, by name."""


Scale = float | Callable[[float], float]
"""The scale of a flow: a number, or a function of the time. 1 is no guidance."""


@dataclass(frozen=True)
class Guidance:
    """Rows of conditions, one forward pass over all of them, and their combination.

    With rows r_0, r_1, ..., r_n the scales s_1, ..., s_n belong to neighbouring rows:

        guided = r_n + s_n (r_{n-1} - r_n) + ... + s_1 (r_0 - r_1)

    Two rows with one scale are classifier-free guidance, null + s (conditional - null). Three are, for example, the
    text and image scales of Ming-UniVision: rows (), ("ids",), ("ids", "given") and scales (text, image).

    Attributes:
        rows: for each row the parts of the condition that it drops; the first drops none.
        scales: one schedule fewer than rows.
        combination: how the outputs of the rows are combined.

    Raises:
        ValueError: the number of scales is not the number of rows minus 1.
    """

    rows: tuple[Parts, ...] = ((),)
    scales: tuple[Schedule, ...] = ()
    combination: Combination = PLAIN

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.rows) - 1:
            raise ValueError(f"{len(self.rows)} rows take {len(self.rows) - 1} scales, got {len(self.scales)}")

    @property
    def is_on(self) -> bool:
        """Whether there is more than the conditional row."""
        return len(self.rows) > 1

    def weights(self, step: float, steps: float) -> tuple[float, ...]:
        """The weight of each row at a step; the sum is 1."""
        scales = [schedule(step, steps) for schedule in self.scales]
        return tuple(after - before for before, after in zip([0.0, *scales], [*scales, 1.0]))

    def at(self, step: float, steps: float) -> Guidance:
        """This guidance with its scales fixed at those of one step, for the flow that draws the tokens of that step."""
        return replace(self, scales=tuple(constant(schedule(step, steps)) for schedule in self.scales))

    def conditions(self, condition: Condition) -> Condition:
        """The conditions (R * B) of all rows, row by row, from one condition (B)."""
        if not self.is_on:
            return condition
        return Condition.cat([condition.without(parts) for parts in self.rows])

    def repeat(self, values: Tensor) -> Tensor:
        """Values (B, ...) repeated for each row: (R * B, ...)."""
        return torch.cat([values] * len(self.rows)) if self.is_on else values

    def conditional(self, outputs: Tensor) -> Tensor:
        """The conditional row (B, ...) of outputs (R * B, ...)."""
        return outputs.chunk(len(self.rows))[0]

    def start(self) -> Callable[[Tensor, Weights], Tensor]:
        """The function (outputs (R * B, ...), weights) -> (B, ...) for all steps of one trajectory."""
        combine = self.combination.start()
        return lambda outputs, weights: combine(outputs.chunk(len(self.rows)), weights) if self.is_on else outputs

    def combine(self, outputs: Tensor, weights: Weights) -> Tensor:
        """Outputs (R * B, ...) to (B, ...), for combinations that keep no state between steps."""
        return self.start()(outputs, weights)


OFF = Guidance()
"""The conditional row alone."""


def classifier_free(
    scale: float | tuple[float, float] | Schedule,
    schedule: str = "constant",
    *,
    interval: tuple[float, float] | None = None,
    power: float | None = None,
    window: tuple[float, float] | None = None,
    combination: Combination = PLAIN,
) -> Guidance:
    """Classifier-free guidance: a row with the whole condition and a row without it.

    Args:
        scale: s in ``null + s (conditional - null)``; 1 is off. A pair (first, last) rises linearly, as "linear"
            or "linear-done" does. Or a schedule, which is taken as it is.
        schedule, power, window: see ``named``.
        interval: (start, stop), the steps that are guided; None is all.

    Raises:
        ValueError: a scale that is negative or not finite, a pair with a schedule that is not linear, an interval that
            ends before it starts, or as ``named``.
    """
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"guidance_interval is (start, stop), with 0 <= start <= stop; got {tuple(interval)}")
    if callable(scale):
        chosen = scale
    else:
        ends = check_scale(scale)
        if len(ends) == 2 and schedule not in ("constant", "linear", "linear-done"):
            raise ValueError(f"guidance_scale {scale} rises linearly; it takes no guidance_schedule {schedule!r}")
        chosen = named(schedule, ends[-1], power=power, window=window)
        if len(ends) == 2:
            chosen = (linear_done if schedule == "linear-done" else linear)(ends[1], ends[0])
        if set(ends) == {1}:
            return OFF
    return Guidance(((), PARTS), (within(chosen, *interval) if interval else chosen,), combination)


def check_scale(scale: float | tuple[float, float]) -> tuple[float, ...]:
    """The numbers of a scale or of a pair (first, last), each finite and not negative; else ValueError."""
    ends = tuple(scale) if isinstance(scale, tuple | list) else (scale,)
    if len(ends) not in (1, 2) or not all(0 <= end < math.inf for end in ends):
        raise ValueError(f"guidance_scale must be finite and not negative (1 is off), got {scale}")
    return ends
