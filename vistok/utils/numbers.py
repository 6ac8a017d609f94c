"""Checks of numbers that users give."""

from __future__ import annotations

import operator
from typing import Any


def check_whole(name: str, value: Any, *, least: int | None = None) -> None:
    """Raise ValueError unless ``value``, of the argument ``name``, is an integer of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
