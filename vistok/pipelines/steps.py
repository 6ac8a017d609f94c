"""Callbacks while a batch is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vistok.types import TokenChunk

StepCallback = Callable[[Any, int, int, Mapping[str, Tensor]], Any]
"""``callback(pipe, step, positions, tensors)`` after each step, as diffusers calls it; see ``every_step``."""


def every_step(pipe: Any, callback: StepCallback | None) -> Callable[[TokenChunk], None] | None:
    """What a generator calls after each step of one batch, for ``callback``; None for none.

    The callback gets the pipeline, the number of the step from 0, how many positions of each image are done by it, and
    ``{"tokens": …, "positions": …}`` of this step, (B, n[, D]) and (B, n), on the device. What it returns is not used;
    an exception that it raises ends the call.
    """
    if callback is None:
        return None
    step = done = 0

    def on_step(chunk: TokenChunk) -> None:
        nonlocal step, done
        # Of speculative decoding a row may have committed fewer; counting them would wait for the device.
        done = min(done + chunk.positions.shape[1], pipe.generator.spec.length)
        callback(pipe, step, done, {"tokens": chunk.tokens, "positions": chunk.positions})
        step += 1

    return on_step
