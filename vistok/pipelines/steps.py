"""Callbacks that run after each step while a batch is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vistok.types import TokenChunk

StepCallback = Callable[[Any, int, int, Mapping[str, Tensor]], Any]
"""``callback(pipe, step, positions, tensors)`` after each step, as diffusers calls it; see ``every_step``."""


def every_step(pipe: Any, callback: StepCallback | None) -> Callable[[TokenChunk], None] | None:
    """Wrap ``callback`` as the ``on_step`` of a generator, for one batch; None if there is no callback.

    The callback gets the pipeline, the index of the step, the number of positions of each image that are done after it,
    and this step's ``{"tokens": (B, n[, D]), "positions": (B, n)}`` on the device. Its return value is ignored; an
    exception that it raises ends the call.
    """
    if callback is None:
        return None
    step = done = 0

    def on_step(chunk: TokenChunk) -> None:
        nonlocal step, done
        # Speculative decoding may have committed fewer in some rows; to count them the host would wait for the device.
        done = min(done + chunk.positions.shape[1], pipe.generator.spec.length)
        callback(pipe, step, done, {"tokens": chunk.tokens, "positions": chunk.positions})
        step += 1

    return on_step
