"""Checks for NaN and infinities where they first appear, before they turn into wrong ids or images."""

from __future__ import annotations

import torch
from torch import Tensor

NONE = torch.iinfo(torch.int64).max


def explain(what: str, dtype: torch.dtype) -> str:
    """The message that ``what`` is not finite in ``dtype``, with a remedy."""
    name = str(dtype).removeprefix("torch.")
    remedy = (
        "float16 has too small a range; take bfloat16 or float32"
        if dtype == torch.float16
        else "the weights hold NaN or infinities, or values grow beyond the range"
    )
    return f"{what} are not finite in {name}: {remedy}"


class FirstFailure:
    """Records, on the device and during a loop, the first token of a batch whose values are not finite.

    Args:
        what: what the values are, such as "latents".
        dtype: of the weights that make them.
    """

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        self._what, self._dtype = what, dtype
        self._first: Tensor | None = None

    def note(self, values: Tensor, positions: Tensor | None = None) -> None:
        """Record values (B, n, ...) of the tokens at ``positions`` (B, n) or of the first n; the host does not wait."""
        wrong = ~values.isfinite().flatten(2).all(-1)
        places = torch.arange(wrong.shape[1], device=wrong.device) if positions is None else positions
        first = torch.where(wrong, places, NONE).amin()
        self._first = first if self._first is None else torch.minimum(self._first, first)

    def check(self) -> None:
        """Raise ValueError, naming the token, if one was recorded. Only here the host waits for the device."""
        if self._first is not None and int(self._first) < NONE:
            raise ValueError(explain(f"the {self._what} of token {int(self._first)}", self._dtype))


def check_finite(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """Return the values (B, n, ...) of the first n tokens if all are finite; the host waits for the device.

    Raises:
        ValueError: a value is NaN or infinite; the message names the first such token.
    """
    failure = FirstFailure(what, dtype)
    failure.note(values)
    failure.check()
    return values


def finite_latents(latents: Tensor) -> Tensor:
    """Return latents of images if all are finite; the host waits for the device.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not bool(latents.isfinite().all()):
        raise ValueError(explain("the latents of these images", latents.dtype))
    return latents
