"""Windows of a raster: space to depth and back."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def window_members(length: int, grid: tuple[int, ...] | None, size: int, what: str = "windows") -> Tensor:
    """The raster indices (L / s^2, s^2) of the tokens of every window of s x s; windows and tokens in raster order.

    Args:
        length: number of tokens L.
        grid: (h, w) of the tokens; not read if ``size`` is 1.
        size: side s of a window.
        what: the name of the size in messages.

    Raises:
        ValueError: a size below 1, a grid that the size does not divide, or tokens that do not lie on an (h, w) grid.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {size!r}")
    raster = torch.arange(length)
    if size == 1:
        return raster[:, None]
    if grid is None or len(grid) != 2 or any(side % size for side in grid):
        raise ValueError(f"{what} {size} does not divide the token grid {grid}")
    return rearrange(raster, "(h p w q) -> (h w) (p q)", h=grid[0] // size, p=size, q=size)
