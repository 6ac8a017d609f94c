"""Checks of numbers that users give."""

from __future__ import annotations

import operator
from typing import Any

MOST_IMAGES = 10**7
"""The most images that one call generates; more take a seed of their own, or another ``index_start``."""
SEEDS = (-(2**63), 2**64 - 1)
"""The least and the largest seed: draws know 64 bits of it, so that others would equal one of these."""


def check_whole(
    name: str, value: Any, *, least: int | None = None, most: int | None = None, optional: bool = False
) -> None:
    """Raise ValueError unless ``value``, of the argument ``name``, is an integer of at least ``least`` and at most
    ``most``; or None, if it is ``optional``."""
    if value is None and optional:
        return
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


def check_seed(seed: Any, *, optional: bool = False) -> None:
    """Raise ValueError unless ``seed`` is one of ``SEEDS``; or None, if it is ``optional``."""
    check_whole("seed", seed, least=SEEDS[0], most=SEEDS[1], optional=optional)
