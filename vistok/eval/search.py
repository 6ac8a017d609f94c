"""Search for the best guidance scale: steps to a local minimum of the score."""

from __future__ import annotations

from collections.abc import Callable

SEARCH_STEP = 0.25
LOWEST_SCALE = 1.0
"""No guidance."""


def local_minimum(score: Callable[[float], float], start: float, step: float = SEARCH_STEP) -> float:
    """A scale whose score is a local minimum.

    The search goes up from ``start`` while the score falls. If the first step up does not help, it goes down. Neither
    neighbour of the result is better; scales below ``LOWEST_SCALE`` are not tried.

    Args:
        score: the score of a scale; lower is better.
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
