"""The static cache of an autoregressive transformer."""

from __future__ import annotations

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


class KVCache:
    """Keys and values of all layers in one allocation, made once per sampling session.

    Args:
        layers, rows, heads, length, head_dim: the sizes; ``rows`` counts guidance rows too.
        shift_dim: width of the token shift's memory, 0 for models without one.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        head_dim: int,
        *,
        shift_dim: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        buffer = torch.empty(layers, 2, rows, heads, length, head_dim, dtype=dtype, device=device)
        shift = torch.zeros(layers, rows, 1, shift_dim, dtype=dtype, device=device) if shift_dim else [None] * layers
        self.layers = [LayerCache(pair[0], pair[1], memory) for pair, memory in zip(buffer, shift)]
        self.nbytes = buffer.nbytes + (shift.nbytes if shift_dim else 0)

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on: those that are still being made."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
