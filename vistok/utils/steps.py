"""The bound on the number of sampling steps."""

from __future__ import annotations

from numbers import Integral
from typing import Any

MOST_STEPS = 10_000
"""More than any sampler uses; a larger number is a typo that would run for days or fill the memory."""


def check_steps(name: str, count: Any, least: int = 1) -> None:
    """Raise ValueError unless ``count``, of the option ``name``, is an integer from ``least`` to ``MOST_STEPS``."""
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not whole or count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}; for example {name}=25")
    if count > MOST_STEPS:
        raise ValueError(f"{name} must be at most {MOST_STEPS:,}, got {count:,}; is a digit too much?")
