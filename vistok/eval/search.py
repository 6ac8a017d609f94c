"""The search of a guidance scale: a walk to a local minimum, as papers find the scale that they report."""

from __future__ import annotations

from collections.abc import Callable

SEARCH_STEP = 0.25
LOWEST_SCALE = 1.0
"""No guidance."""


def local_minimum(score: Callable[[float], float], start: float, step: float = SEARCH_STEP) -> float:
    """The scale that a walk from ``start`` ends at. It goes up in steps while the score falls, or else down.

    Neither neighbour of the result is better; scales below ``LOWEST_SCALE`` are not tried.

    Args:
        score: of a scale; asked once for each.
    """
    place, lowest = 0, score(start)
    for direction in (1, -1):
        begin = place
        while (scale := _scale(start, place + direction, step)) >= LOWEST_SCALE:
            value = score(scale)
            if not value < lowest:
                break
            place, lowest = place + direction, value
        if place != begin:
            break
    return _scale(start, place, step)


def _scale(start: float, place: int, step: float) -> float:
    return round(start + place * step, 6)
