"""Position tables: fixed sines and cosines, and the learned tables that replace them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def sincos_3d(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Table (t * h * w, dim) float32 of a clip, time first: the sum of ``sincos_2d`` of the frame and ``sincos_1d`` of
    the time, both as wide as ``dim`` (LARP, arXiv 2410.21264).

    Raises:
        ValueError: dim is not divisible by 4.
    """
    t, h, w = grid
    frame, time = sincos_2d((h, w), dim), sincos_1d(torch.arange(t), dim).float()
    return (time[:, None] + frame).flatten(0, 1)  # (t, h * w, dim) -> (t * h * w, dim)


class FixedClipPositions(nn.Module):
    """A fixed table, ``sincos_3d``, of the cells of a clip. Shorter clips use its first rows.

    Args:
        grid: (t, h, w) cells.
        dim: width of the table.
    """

    table: Tensor

    def __init__(self, grid: tuple[int, int, int], dim: int):
        super().__init__()
        self.register_buffer("table", sincos_3d(grid, dim))
        self.frame_cells = grid[1] * grid[2]

    def forward(self, t: int) -> Tensor:
        """(t * h * w, dim) of the first ``t`` steps of time."""
        return self.table[: t * self.frame_cells]


class LearnedClipPositions(nn.Module):
    """The sum of a learned vector for each time, row and column. The vectors start as ``sincos_1d``.

    Args:
        grid: (t, h, w) cells.
        dim: width of the vectors.
    """

    def __init__(self, grid: tuple[int, int, int], dim: int):
        super().__init__()
        self.time, self.rows, self.columns = (
            nn.Parameter(sincos_1d(torch.arange(count), dim).float()) for count in grid
        )

    def forward(self, t: int) -> Tensor:
        """(t * h * w, dim) of the first ``t`` steps of time."""
        cells = self.time[:t, None, None] + self.rows[:, None] + self.columns  # (t, h, w, dim)
        return cells.flatten(0, 2)


def resized_grid(table: Tensor, own: tuple[int, int], grid: tuple[int, int], *, offset: float) -> Tensor:
    """Resize a learned table (1, h * w, D) of the grid ``own`` to another grid: (1, h' * w', D).

    Bicubic, in float32. Sampling points lie as if the other grid had ``offset`` more rows and columns, as in DINO
    (arXiv 2104.14294); ``offset`` 0 is plain resizing. For the same grid the table is returned unchanged.

    Raises:
        ValueError: ``offset`` is so large that the result has another size than the grid.
    """
    if own == grid:
        return table
    cells = table.float().unflatten(1, own).permute(0, 3, 1, 2)  # (1, h * w, D) -> (1, D, h, w)
    factors = tuple((new + offset) / old for new, old in zip(grid, own, strict=True))
    cells = F.interpolate(cells, scale_factor=factors, mode="bicubic", align_corners=False)
    if tuple(cells.shape[2:]) != tuple(grid):
        raise ValueError(f"a table of {own[0]}x{own[1]} positions cannot be resized to {grid[0]}x{grid[1]}")
    return cells.flatten(2).mT.to(table.dtype)  # (1, D, h', w') -> (1, h' * w', D)
