"""The static KV cache of an autoregressive transformer.

It counts entries, the positions that the transformer was fed: one per token, or one per window of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class LayerBuffer:
    """One layer's keys and values, written into a buffer of fixed length; attention reads the live part only."""

    def __init__(self, key: Tensor, value: Tensor, shift: Tensor | None):
        self._key, self._value, self._shift = key, value, shift
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (R, H, n, h) keys and values; return all so far, (R, H, length, h) views.

        Raises:
            ValueError: the cache is full.
        """
        start, count = self.length, key.shape[2]
        if start + count > self._key.shape[2]:
            raise ValueError(f"the cache holds {self._key.shape[2]} positions, {start + count} were asked for")
        self._key.narrow(2, start, count).copy_(key)
        self._value.narrow(2, start, count).copy_(value)
        self.length = start + count
        return self._key.narrow(2, 0, self.length), self._value.narrow(2, 0, self.length)

    def shift(self, x: Tensor) -> Tensor:
        """x (R, n, D) delayed by one position: x[:, i] becomes x[:, i - 1], x[:, 0] the last one of the call before."""
        memory = self.shift_memory
        shifted = torch.cat([memory.to(x.dtype), x[:, :-1]], 1)
        memory.copy_(x[:, -1:])
        return shifted

    @property
    def shift_memory(self) -> Tensor:
        """(R, 1, D), the last entry passed to ``shift``. Raises ValueError for a cache without a token shift."""
        if self._shift is None:
            raise ValueError("this cache has no memory of a token shift; it was made with shift_dim 0")
        return self._shift

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._key.nbytes + self._value.nbytes + (0 if self._shift is None else self._shift.nbytes)

    def at(self, slots: Tensor) -> IndexedBuffer:
        """This layer's cache, written at the slots that a tensor holds."""
        return IndexedBuffer(self, slots)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` entries in all."""
        more = length - self._key.shape[2]
        if more > 0:
            self._key, self._value = (F.pad(kept, (0, 0, 0, more)) for kept in (self._key, self._value))

    def choose(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be listed more than once."""
        self._key, self._value = self._key[rows], self._value[rows]
        if self._shift is not None:
            self._shift = self._shift[rows]


class IndexedBuffer:
    """A layer's cache that is written at given slots: for compiled graphs, whose shapes must not change, and for rows
    of different lengths.

    Attention reads the whole buffer: a mask must hide the unwritten slots.

    Args:
        slots: (n,) for all rows, or (R, n), the slots of new entries. Read in each call, so they may be changed in
            place.
    """

    def __init__(self, layer: LayerBuffer, slots: Tensor):
        self._layer, self._slots = layer, slots
        self._recent: Tensor | None = None
        for buffer in (layer._key, layer._value):
            buffer[:, :, layer.length :] = 0  # a hidden value has weight 0, but 0 times NaN is NaN

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, H, n, h); return the buffers, (R, H, all slots, h)."""
        buffers = self._layer._key, self._layer._value
        for buffer, new in zip(buffers, (key, value)):
            if self._slots.ndim == 1:
                buffer[:, :, self._slots] = new.to(buffer)
            else:
                buffer.scatter_(2, self._slots[:, None, :, None].expand_as(new), new.to(buffer))
        return buffers

    def shift(self, x: Tensor) -> Tensor:
        """See ``LayerBuffer.shift``. With slots per row, ``cut`` must follow: it sets the memory."""
        if self._slots.ndim == 1:
            return self._layer.shift(x)
        self._recent = torch.cat([self._layer.shift_memory.to(x), x], 1)
        return self._recent[:, :-1]

    def cut(self, kept: Tensor) -> None:
        """Set the memory of ``shift`` as if its last call had only the first ``kept`` (R,) entries of each row."""
        if self._recent is not None:
            index = kept[:, None, None].expand(-1, 1, self._recent.shape[2])
            self._layer.shift_memory.copy_(self._recent.gather(1, index))


CachedLayer = LayerBuffer | IndexedBuffer
CachedLayers = Sequence[CachedLayer]


def of_layers(kv_cache: CachedLayers | None, count: int) -> Sequence[CachedLayer | None]:
    """The cache of each of ``count`` layers; None for each layer if there is no cache."""
    return kv_cache or [None] * count


class KVCache:
    """Keys and values of all layers, allocated once per sampling session.

    All rows have the same length, except between ``at`` and ``settle``.

    Args:
        num_layers, rows, num_heads, length, head_dim: the sizes; ``rows`` counts guidance rows too.
        shift_dim: width of the token shift's memory, 0 for models without one.

    Attributes:
        visible: bool (R or 1, 1, 1, capacity), the entries that later ones may see; None is all.
        offsets: (R, 1) int64, slot minus position id of a row's entries; None is 0.
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        num_heads: int,
        length: int,
        head_dim: int,
        *,
        shift_dim: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        kept = (rows, num_heads, length, head_dim)
        # Each buffer is a tensor of its own: compilers copy a whole tensor if a part of it is written.
        self.layers = [
            LayerBuffer(
                torch.empty(kept, **like),
                torch.empty(kept, **like),
                torch.zeros(rows, 1, shift_dim, **like) if shift_dim else None,
            )
            for _ in range(num_layers)
        ]
        self.capacity, self.dtype = length, dtype
        self.visible: Tensor | None = None
        self.offsets: Tensor | None = None

    @property
    def length(self) -> int:
        """Entries stored so far."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def advance(self, count: int) -> None:
        """Record that ``count`` entries of every row were written through ``at``."""
        for layer in self.layers:
            layer.length += count

    def truncate(self, length: int) -> None:
        """Drop the entries from ``length`` on."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def at(self, slots: Tensor) -> list[IndexedBuffer]:
        """The layers, written at ``slots``, (n,) or (R, n). A write replaces the entry in its slot, so a row is
        shortened by overwriting its last entries."""
        return [layer.at(slots) for layer in self.layers]

    def settle(self, length: int) -> None:
        """Record that all rows have ``length`` entries, after each was written at its own slots."""
        for layer in self.layers:
            layer.length = length

    def reserve(self, length: int) -> None:
        """Grow the cache to ``length`` entries, for sequences whose length is not known at first."""
        for layer in self.layers:
            layer.reserve(length)
        self.capacity = max(self.capacity, length)

    def choose(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be listed more than once (branches, trials)."""
        for layer in self.layers:
            layer.choose(rows)
        if self.visible is not None and len(self.visible) > 1:
            self.visible = self.visible[rows]
        if self.offsets is not None:
            self.offsets = self.offsets[rows]

    def positions(self, slots: Tensor) -> Tensor:
        """The position ids of entries at slots (R, n)."""
        return slots if self.offsets is None else slots - self.offsets

    def seen_from(self, slots: Tensor) -> Tensor:
        """The mask of entries at slots (R, n), bool (R, 1, n, capacity): the visible ones up to and with themselves."""
        seen = torch.arange(self.capacity, device=slots.device) <= slots[:, None, :, None]
        return seen if self.visible is None else seen & self.visible
