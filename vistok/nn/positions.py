"""Fixed sine and cosine position tables."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.nn.rotary import grid_positions


def sincos_1d(positions: Tensor, dim: int, *, base: float = 10000.0) -> Tensor:
    """(N,) positions -> (N, dim) in float64: all sines, then all cosines; frequency k is base^(-k / (dim / 2))."""
    if dim % 2:
        raise ValueError(f"a sine-cosine table needs an even width, got {dim}")
    omega = base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double().unsqueeze(-1) * omega
    return torch.cat([angles.sin(), angles.cos()], -1)


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Table (h * w, dim) float32 of a raster, in the convention of MAE (arXiv 2111.06377): the first half of the
    channels encodes the column, the second half the row.

    Raises:
        ValueError: dim is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sine-cosine table needs a width divisible by 4, got {dim}")
    row, column = grid_positions(grid).unbind(-1)
    return torch.cat([sincos_1d(column, dim // 2), sincos_1d(row, dim // 2)], -1).float()
