"""Entity layouts: the units and the order in which a generator predicts the tokens of an image.

xAR (arXiv 2502.20388) calls the unit X: a patch token, a cell of k x k tokens, a subsample of tokens that lie k apart,
a scale of an image pyramid, or the whole image. A layout is an ordered partition of the token grid (for scales, of the
pyramid). It determines the permutation, the block-causal mask, the positions and the rotary coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.nn.rotary import grid_positions
from vistok.types import TokenSpec

Grid = tuple[int, int]


@dataclass(frozen=True)
class LayoutConfig:
    """Which entity a generator predicts next.

    Attributes:
        entity: ``token``: one token after another, in raster order. ``cell``: rectangles of tokens, in raster order.
            ``subsample``: all tokens whose rows and columns are equal modulo ``size``, so that every entity spans the
            image. ``scale``: ever finer versions of the whole token grid. ``image``: everything at once.
        size: side of a cell, or the distance between the tokens of a subsample; (rows, columns) if they differ.
        scales: sides of the versions, coarse to fine; the last is the token grid. For example [1, 2, 4, 8, 16].

    Raises:
        ValueError: a side below 1, or scales for another entity.
    """

    entity: Literal["token", "cell", "subsample", "scale", "image"] = "cell"
    size: int | tuple[int, int] = 8
    scales: tuple[int | tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if min(_pair(self.size)) < 1:
            raise ValueError(f"the size of a {self.entity} must be at least 1, got {self.size}")
        if bool(self.scales) != (self.entity == "scale"):
            raise ValueError(f"entity 'scale' needs scales, and no other has them; got {self.entity!r}, {self.scales}")

    def build(self, spec: TokenSpec) -> EntityLayout:
        """The layout of the tokens of ``spec``; a plain sequence counts as a raster of one row.

        Raises:
            ValueError: tokens of a video, or a size that does not divide the raster.
        """
        grid = spec.grid or (1, spec.length)
        if len(grid) != 2:
            raise ValueError(f"entities need the tokens of an image; this tokenizer has a grid of {grid}")
        one_row = spec.grid is None
        match self.entity:
            case "token":
                return cells(grid, (1, 1))
            case "cell":
                return cells(grid, _pair(self.size, one_row=one_row))
            case "subsample":
                return subsamples(grid, _pair(self.size, one_row=one_row))
            case "scale":
                return pyramid(grid, tuple(_pair(side, one_row=one_row) for side in self.scales))
            case "image":
                return cells(grid, grid)


@dataclass(frozen=True, eq=False)
class EntityLayout:
    """A sequence of N positions, cut into E entities that are generated one after another.

    Attributes:
        grid: (h, w) of the tokens.
        sizes: positions of each entity, in order; N together.
        coordinates: (N, 2) float64, row and column of every position on the token grid.
        permutation: (N,) int64, the raster index of every position; None for a pyramid, which is no permutation.
        scales: the grid of each entity of a pyramid.
    """

    grid: Grid
    sizes: tuple[int, ...]
    coordinates: Tensor
    permutation: Tensor | None = None
    scales: tuple[Grid, ...] = ()

    @property
    def length(self) -> int:
        """Positions N of the sequence."""
        return sum(self.sizes)

    @property
    def num_entities(self) -> int:
        return len(self.sizes)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """E + 1 numbers: entity e holds the positions bounds[e], ..., bounds[e + 1] - 1."""
        return tuple(accumulate(self.sizes, initial=0))

    @cached_property
    def entity_of(self) -> Tensor:
        """(N,) int64: the entity of every position."""
        return torch.repeat_interleave(torch.tensor(self.sizes), output_size=sum(self.sizes))

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The ``block_causal_mask`` of the positions [start, stop)."""
        return block_causal_mask(self.entity_of[:stop], start)

    def to_sequence(self, latents: Tensor) -> Tensor:
        """Latents (B, h * w, D) in raster order to the sequence (B, N, D).

        The coarse versions of a pyramid are averages of the latents.
        """
        if self.permutation is not None:
            return latents[:, self.permutation.to(latents.device, non_blocking=True)]
        image = latents.unflatten(1, self.grid).movedim(-1, 1)  # (B, D, h, w)
        return torch.cat([F.adaptive_avg_pool2d(image, scale).flatten(2).mT for scale in self.scales], 1)

    def to_raster(self, sequence: Tensor) -> Tensor:
        """The whole sequence (B, N, D) to latents (B, h * w, D) in raster order; of a pyramid, its finest version."""
        if self.permutation is None:
            return sequence[:, self.bounds[-2] :]
        return sequence[:, self.permutation.argsort().to(sequence.device)]

    def raster_positions(self, entity: int) -> Tensor:
        """(n,) raster indices of an entity's tokens; empty for coarse versions of a pyramid, which are no tokens."""
        if self.permutation is not None:
            return self.permutation[self.bounds[entity] : self.bounds[entity + 1]]
        final = entity == self.num_entities - 1
        return torch.arange(math.prod(self.grid) if final else 0)


def cells(grid: Grid, size: Grid) -> EntityLayout:
    """Rectangles of ``size`` (rows, columns) tokens; cells, and the tokens of a cell, are in raster order.

    Raises:
        ValueError: the cell does not divide the grid.
    """
    rows, columns = _divide(grid, size, "cell")
    order = torch.arange(math.prod(grid)).view(rows, size[0], columns, size[1])
    return _partition(grid, order.transpose(1, 2).reshape(rows * columns, -1))


def subsamples(grid: Grid, step: Grid) -> EntityLayout:
    """Tokens that lie ``step`` apart: entity (i, j) holds rows i, i + step, ... of columns j, j + step, ...

    Raises:
        ValueError: the step does not divide the grid.
    """
    rows, columns = _divide(grid, step, "subsample")
    order = torch.arange(math.prod(grid)).view(rows, step[0], columns, step[1])
    return _partition(grid, order.permute(1, 3, 0, 2).reshape(step[0] * step[1], -1))


def pyramid(grid: Grid, scales: tuple[Grid, ...]) -> EntityLayout:
    """Coarse to fine versions of the token grid, as one sequence of its own.

    Raises:
        ValueError: scales that do not grow, that do not end with the grid, or that do not divide it.
    """
    if not scales or scales[-1] != grid:
        raise ValueError(f"the last scale must be the token grid {grid}, got scales {scales}")
    for coarse, fine in pairwise(scales):
        if math.prod(coarse) >= math.prod(fine):
            raise ValueError(f"scales must grow from coarse to fine, got {coarse} before {fine}")
    coordinates = []
    for scale in scales:
        factor = torch.tensor(_divide(grid, scale, "scale"), dtype=torch.float64)
        # The centre of the tokens that a coarse position stands for; a token itself keeps its row and column.
        coordinates.append((grid_positions(scale) + 0.5) * factor - 0.5)
    return EntityLayout(grid, tuple(map(math.prod, scales)), torch.cat(coordinates), scales=scales)


def block_causal_mask(entity_of: Tensor, start: int = 0) -> Tensor:
    """Bool (n - start, n), True where attention is allowed: of positions in the entities ``entity_of`` (n,), those from
    ``start`` on see their own entity and all earlier ones."""
    return entity_of[start:, None] >= entity_of[None, :]


def _partition(grid: Grid, entities: Tensor) -> EntityLayout:
    """The layout of raster indices (E, n), one row per entity."""
    permutation = entities.flatten()
    sizes = (entities.shape[1],) * len(entities)
    return EntityLayout(grid, sizes, grid_positions(grid)[permutation].double(), permutation)


def _divide(grid: Grid, size: Grid, what: str) -> Grid:
    if any(not 1 <= part <= side or side % part for side, part in zip(grid, size)):
        raise ValueError(
            f"a {what} of {size[0]}x{size[1]} does not divide the token grid {grid[0]}x{grid[1]}; choose sides that "
            "divide the grid's"
        )
    return grid[0] // size[0], grid[1] // size[1]


def _pair(size: int | tuple[int, int], *, one_row: bool = False) -> Grid:
    return (1 if one_row else size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
