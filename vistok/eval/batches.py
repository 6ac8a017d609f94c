"""Batches of one fixed shape for every network, so that no score depends on how the images were batched.

Libraries choose a kernel by the shape of its input, and kernels round differently: float32 features from a batch of 7
images differ in the last digits from those of a batch of 50. This changes scores that are small differences of large
sums, such as the kernel distance. With a fixed batch shape, the features of an image depend on that image alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vistok.types import Condition

NETWORK_BATCH = 16


def filled(rows: Tensor) -> Tensor:
    """Pad rows (n, ...), n <= NETWORK_BATCH, to (NETWORK_BATCH, ...) with copies of the last row."""
    missing = NETWORK_BATCH - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def filled_condition(condition: Condition) -> Condition:
    """Pad a condition of n rows to NETWORK_BATCH rows, as ``filled`` pads the rows."""
    return condition[torch.arange(NETWORK_BATCH).clamp_max(len(condition) - 1)]


class Regrouper:
    """Regroups rows from batches of any size into batches of ``size``, in the same order.

    Attributes:
        rest: the rows (n, ...) that do not fill a batch yet; None before the first rows.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.rest: Tensor | None = None

    def add(self, rows: Tensor) -> Iterator[Tensor]:
        """Add rows (n, ...); returns the batches that they complete."""
        rows = rows if self.rest is None else torch.cat([self.rest, rows])
        whole = len(rows) // self._size * self._size
        self.rest = rows[whole:]
        return (rows[start : start + self._size] for start in range(0, whole, self._size))


def regrouped(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the same rows in the same order, ``size`` at a time; the last batch may be smaller."""
    groups = Regrouper(size)
    for batch in batches:
        yield from groups.add(batch)
    if groups.rest is not None and len(groups.rest):
        yield groups.rest
