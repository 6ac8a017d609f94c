"""Schedules of the guidance scale over the share of a sequence that is done, as GigaTok (arXiv 2504.08736) names them.

The first token takes the whole scale. Token ``step`` of ``steps``, counted from 0, lies at the ratio
r = step / (steps - 1) after it.
"""

from __future__ import annotations

from collections.abc import Callable

OFF = 1.0001  # a hair above 1: unguided in effect, while the null rows stay in the batch
RISE_FROM = 1.0001

RATIO_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: r,
    "linear_re": lambda r: 1 - r,
    "triangular": lambda r: 1 - abs(2 * r - 1),
}
"""The share of the scale above 1 at each ratio, 0 to 1; largest at the end, at the start, and in the middle."""


def ratio_scale(name: str, scale: float, step: int, steps: int, *, window: tuple[float, float] | None = None) -> float:
    """The guidance scale of one token.

    Args:
        name: "constant"; "step", off before the window; "rectangular", off outside of it; or one of
            ``RATIO_SCHEDULES``.
        window: (start, stop) ratios; (0.18, 1) for "step" and (0.05, 1) for "rectangular" if None.

    Raises:
        ValueError: an unknown name, or a step that is none of ``steps``.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in 0..{steps - 1}, got {step}")
    known = ("constant", *WINDOWS, *RATIO_SCHEDULES)
    if name not in known:
        raise ValueError(f"unknown guidance schedule {name!r}; there are {', '.join(known)}")
    if step == 0 or name == "constant":
        return scale
    ratio = step / (steps - 1)
    if name in WINDOWS:
        start, stop = window or WINDOWS[name]
        return scale if start <= ratio <= stop else OFF
    return RISE_FROM + (scale - 1) * RATIO_SCHEDULES[name](ratio)


WINDOWS = {"step": (0.18, 1.0), "rectangular": (0.05, 1.0)}
