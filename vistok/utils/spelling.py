"""Hints for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def nearest(name: str, allowed: Sequence[str]) -> str | None:
    """Return the allowed name that ``name`` is most likely a misspelling of, or None."""
    lowered = {candidate.lower(): candidate for candidate in allowed}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def suggestion(name: Any, allowed: Sequence[str]) -> str:
    """The hint for an unknown name: "; did you mean 'x'?", or "" if no allowed name is near."""
    near = nearest(name, allowed) if isinstance(name, str) else None
    return did_you_mean(repr(near)) if near else ""


def did_you_mean(*near: str) -> str:
    """The end of a message about an unknown name: "; did you mean x or y?", or "." without names."""
    return f"; did you mean {' or '.join(near)}?" if near else "."
