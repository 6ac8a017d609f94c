"""The static cache of an autoregressive transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
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
        """x (R, n, D) delayed by one position: row i becomes x[i - 1], row 0 the last x of the previous call."""
        shifted = torch.cat([self._shift, x[:, :-1]], 1)
        self._shift.copy_(x[:, -1:])
        return shifted

    def at(self, position: Tensor) -> IndexedLayer:
        """The same memory for steps that write at a position which a tensor holds."""
        return IndexedLayer(self, position)


class IndexedLayer:
    """A layer's cache for steps of one token whose shapes never change, as compiled graphs want it.

    The token's position is a tensor (1,), and attention reads the whole buffer: a mask must hide what lies behind.
    """

    def __init__(self, layer: LayerCache, position: Tensor):
        self._key, self._value, self._position, self.shift = layer._key, layer._value, position, layer.shift
        for buffer in (self._key, self._value):
            buffer[:, :, layer.length :] = 0  # a hidden value has weight 0, but 0 times NaN is NaN

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, H, 1, h); return the buffers, (R, H, all positions, h)."""
        self._key[:, :, self._position] = key
        self._value[:, :, self._position] = value
        return self._key, self._value


Layer = LayerCache | IndexedLayer
Layers = Sequence[Layer]


class KVCache:
    """Keys and values of all layers, allocated once per sampling session.

    Args:
        num_layers, rows, num_heads, length, head_dim: the sizes; ``rows`` counts guidance rows too.
        shift_dim: width of the token shift's memory, 0 for models without one.
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
        like = {"dtype": dtype, "device": device}
        kept = (rows, num_heads, length, head_dim)
        # Each a tensor of its own: compilers copy the whole of a tensor of which a part is written.
        self.layers = [
            LayerCache(
                torch.empty(kept, **like),
                torch.empty(kept, **like),
                torch.zeros(rows, 1, shift_dim, **like) if shift_dim else None,
            )
            for _ in range(num_layers)
        ]
        self.nbytes = num_layers * rows * (2 * num_heads * length * head_dim + shift_dim) * dtype.itemsize

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length

    def advance(self, count: int) -> None:
        """Say that ``count`` positions were written through ``at``."""
        for layer in self.layers:
            layer.length += count

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on: those that are still being made."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
