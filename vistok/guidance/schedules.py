"""How a guidance scale changes over the steps of a sample.

A step is a token, a window of tokens, an entity or an iteration, counted from 0. The papers divide differently, so each
schedule states its own formula; s is the whole scale, i the step, n the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

Schedule = Callable[[float, float], float]
"""The scale at a step: (step, steps) -> scale, with 0 <= step < steps. A flow passes its time as the step."""


def constant(scale: float) -> Schedule:
    """s, at every step."""
    return lambda step, steps: scale


def linear(scale: float, first: float = 1.0) -> Schedule:
    """first + (s - first) i / (n - 1): the last step has the whole scale. A single step has it too.

    xAR (arXiv 2502.20388) over its entities, D-AR (arXiv 2505.23660) over its tokens, MAR (arXiv 2406.11838) over how
    many of its tokens are known.
    """
    return lambda step, steps: first + (scale - first) * (step / (steps - 1) if steps > 1 else 1.0)


def linear_done(scale: float, first: float = 1.0) -> Schedule:
    """first + (s - first) i / n, where i / n is the share of finished steps. TiTok's MaskGIT (arXiv 2406.07550)."""
    return lambda step, steps: first + (scale - first) * (step / steps)


def cosine(scale: float) -> Schedule:
    """1 + (s - 1) (1 - cos(pi i / (n - 1))) / 2: as ``linear``, but level at both ends."""
    return lambda step, steps: 1 + (scale - 1) * (1 - math.cos(math.pi * (step / (steps - 1) if steps > 1 else 1))) / 2


def power_cosine(scale: float, power: float = 1.0) -> Schedule:
    """1 + (s - 1) (1 - cos(pi (i / n)^power)) / 2; power 0 is constant, as 0^0 is 1. RAR (arXiv 2411.00776)."""
    return lambda step, steps: (scale - 1) * ((1 - math.cos(math.pi * (step / steps) ** power)) / 2) + 1


def half_linear(scale: float) -> Schedule:
    """1 + (s - 1) min(1, i / (n / 2)): rising over the first half. Token-Shuffle (arXiv 2504.17789)."""
    return lambda step, steps: 1 + (scale - 1) * min(1.0, step / (steps / 2))


# ---------------------------------------------------------------------------------------------------------------------
# GigaTok (arXiv 2504.08736): the first token has the whole scale; the others depend on the ratio r = i / (n - 1).
# Where guidance is off, the scale is 1 + HAIR, so the null rows still count.

HAIR = 1e-4


def after_first(scale: float, rest: Callable[[float], float]) -> Schedule:
    """s for the first step, ``rest(r)`` for the others."""
    return lambda step, steps: scale if step == 0 else rest(step / (steps - 1))


def inside(scale: float, window: tuple[float, float]) -> Schedule:
    """s where window[0] <= r <= window[1], and 1 + HAIR elsewhere ("step", "rectangular")."""
    return after_first(scale, lambda r: scale if window[0] <= r <= window[1] else 1 + HAIR)


def rising(scale: float, share: Callable[[float], float]) -> Schedule:
    """1 + HAIR + (s - 1) share(r) ("linear_ratio", "linear_re", "triangular")."""
    return after_first(scale, lambda r: 1 + HAIR + (scale - 1) * share(r))


WINDOWS = {"step": (0.18, 1.0), "rectangular": (0.05, 1.0)}
SHARES = {"linear_ratio": lambda r: r, "linear_re": lambda r: 1 - r, "triangular": lambda r: 1 - abs(2 * r - 1)}


# ---------------------------------------------------------------------------------------------------------------------
# By name


ScheduleName = Literal[
    "constant",
    "linear",
    "linear-done",
    "cosine",
    "half-linear",
    "power-cosine",
    "step",
    "rectangular",
    "linear_ratio",
    "linear_re",
    "triangular",
]
SCHEDULES = {
    "constant": constant,
    "linear": linear,
    "linear-done": linear_done,
    "cosine": cosine,
    "half-linear": half_linear,
}
POWERS = {"power-cosine": power_cosine}
NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)


def named(
    name: str, scale: float, *, power: float | None = None, window: tuple[float, float] | None = None
) -> Schedule:
    """The schedule of this name that reaches ``scale``.

    Args:
        power: of "power-cosine"; None is 1.
        window: (start, stop), ratios in [0, 1] of "step" and "rectangular"; None is (0.18, 1) and (0.05, 1).

    Raises:
        ValueError: an unknown name, or a power or window that is invalid or not taken by the schedule.
    """
    if name not in NAMES:
        raise ValueError(f"guidance_schedule must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if power is not None and not (name in POWERS and 0 <= power < math.inf):
        raise ValueError(f"guidance_power is for 'power-cosine' and must not be negative; got {power} for {name!r}")
    if window is not None and not (name in WINDOWS and 0 <= window[0] <= window[1] <= 1):
        allowed = " and ".join(map(repr, WINDOWS))
        raise ValueError(f"guidance_window is (start, stop) in [0, 1] for {allowed}; got {window} for {name!r}")
    if name in POWERS:
        return POWERS[name](scale, 1.0 if power is None else power)
    if name in WINDOWS:
        return inside(scale, window or WINDOWS[name])
    return rising(scale, SHARES[name]) if name in SHARES else SCHEDULES[name](scale)


def within(schedule: Schedule, start: float, stop: float) -> Schedule:
    """``schedule`` where start <= i < stop; elsewhere 1, the conditional row alone."""
    return lambda step, steps: schedule(step, steps) if start <= step < stop else 1.0


def at_time(scale: Callable[[float], float]) -> Schedule:
    """The schedule of a flow whose scale is a function of the time."""
    return lambda time, steps: float(scale(time))
