"""What messages say of misspelt names."""

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
    """What a message says of an unknown name: "; did you mean 'x'?", or nothing where no allowed one is near."""
    near = nearest(name, allowed) if isinstance(name, str) else None
    return did_you_mean(repr(near)) if near else ""


def did_you_mean(*near: str) -> str:
    """How a message goes on after an unknown name: "; did you mean x or y?", or "." where nothing is near."""
    return f"; did you mean {' or '.join(near)}?" if near else "."
