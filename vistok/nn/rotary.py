"""Rotary position embedding (RoFormer, arXiv 2104.09864) over one or more axes.

Channels are rotated in adjacent pairs (2i, 2i + 1). With several axes each gets an equal share of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

Positions = slice | Tensor
"""A slice of consecutive positions, or an index tensor of any: (N,) for all samples, or (B, N). Compiled graphs can
read a tensor anew at each call."""


class Rotation(NamedTuple):
    """Cosines and sines, (N, head_dim / 2) each, of N positions; (B, 1, N, head_dim / 2) where samples differ."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Positions) -> Rotation:
        """The rotation of some of the positions."""
        return Rotation(self.cos[positions], self.sin[positions])


class FixedRotation(nn.Module):
    """Rotary tables that follow their model to its device, but stay float32 when the model is cast.

    They are not saved. In bfloat16 the angles of neighbouring positions would round to the same value.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rotation: Rotation):
        super().__init__()
        self.register_buffer("cos", rotation.cos, persistent=False)
        self.register_buffer("sin", rotation.sin, persistent=False)

    def forward(self, positions: Positions) -> Rotation:
        """The rotation of some positions."""
        cos, sin = self.cos[positions], self.sin[positions]
        if isinstance(positions, Tensor) and positions.ndim == 2:  # for all heads: (B, 1, N, head_dim / 2)
            return Rotation(cos.unsqueeze(1), sin.unsqueeze(1))
        return Rotation(cos, sin)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            device = self.cos.device
            self.cos, self.sin = cos.to(device), sin.to(device)
        return self


def rotation_table(positions: Tensor, head_dim: int, *, base: float = 10000.0) -> Rotation:
    """The rotation of every position.

    Args:
        positions: (N, axes) coordinates.
        head_dim: channels of a head; must be divisible by 2 * axes.
        base: frequency j of an axis with n pairs is ``base ** (-j / n)``.
    """
    axes = positions.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim {head_dim} must be divisible by {2 * axes} for rotary positions over {axes} axes")
    pairs = head_dim // (2 * axes)
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = (positions.double().unsqueeze(-1) * frequencies).flatten(1)  # (N, axes * pairs)
    return Rotation(angles.cos().float(), angles.sin().float())


def grid_positions(grid: tuple[int, ...]) -> Tensor:
    """Coordinates (prod(grid), len(grid)) of a raster, last axis fastest."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], -1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the channel pairs of x (..., N, head_dim), computed in float32 and cast back."""
    pairs, (cos, sin) = x.float().unflatten(-1, (-1, 2)), rotation
    if torch.compiler.is_compiling():  # compilers fuse real products, but not complex ones
        even, odd = pairs.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    else:  # one operation instead of six: faster for a single token
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).type_as(x)
