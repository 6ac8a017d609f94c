"""Batches of one shape for every network, so that no score depends on how the images were batched.

Libraries choose a kernel by the shape of its input, and kernels round differently: float32 features of 7 images at a
time differ in the last digits from those of 50. Scores that are small differences of large sums, such as the kernel
distance, show it. In batches of one shape the features of an image depend on that image alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

NETWORK_BATCH = 16


def filled(rows: Tensor) -> Tensor:
    """(n, ...) of at most ``NETWORK_BATCH`` rows, and copies of the last one: (NETWORK_BATCH, ...)."""
    missing = NETWORK_BATCH - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def regrouped(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in the same order, ``size`` at a time; the last batch may be smaller."""
    waiting: Tensor | None = None
    for batch in batches:
        rows = batch if waiting is None else torch.cat([waiting, batch])
        whole = len(rows) // size * size
        yield from (rows[start : start + size] for start in range(0, whole, size))
        waiting = rows[whole:]
    if waiting is not None and len(waiting):
        yield waiting
