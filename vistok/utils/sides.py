"""Sides of images, and the grids of their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def image_sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an ``image_size``: the side of a square, or both."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return int(height), int(width)


def times(sides: Sequence[int]) -> str:
    """Sides as text: "256x256"."""
    return "x".join(map(str, sides))


def grid_of(sides: Sequence[int], stride: int) -> tuple[int, int]:
    """(h, w) of the tokens of an image of (height, width).

    Raises:
        ValueError: a side is not a positive multiple of ``stride``.
    """
    height, width = sides
    if height < 1 or width < 1 or height % stride or width % stride:
        raise ValueError(f"image sides must be multiples of {stride}, got {height}x{width}; resize or crop the images")
    return height // stride, width // stride


def check_grid(tokens: Tensor, grid: Sequence[int]) -> None:
    """Raise ValueError unless the number L of tokens (B, L, …) is that of the grid."""
    if tokens.shape[1] != math.prod(grid):
        raise ValueError(
            f"a grid of {times(grid)} has {math.prod(grid)} tokens, got {tokens.shape[1]}; pass grid=(h, w) for other "
            "image sizes"
        )
