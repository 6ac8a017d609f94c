"""Entity layouts: properties that hold for any grid and any entity."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.generators.xar.layouts import LayoutConfig, cells, pyramid, subsamples
from vistok.nn.rotary import grid_positions
from vistok.types import TokenSpec

anytime = settings(deadline=None)
sides = st.integers(1, 4)


def spec(grid: tuple[int, int]) -> TokenSpec:
    return TokenSpec(math.prod(grid), None, dim=3, grid=grid)


@st.composite
def partitions(draw, makers=(cells, subsamples)):
    """(grid, size, layout) of cells or subsamples."""
    size, count = (draw(sides), draw(sides)), (draw(sides), draw(sides))
    grid = (size[0] * count[0], size[1] * count[1])
    return (grid, size, draw(st.sampled_from(makers))(grid, size))


@st.composite
def pyramids(draw):
    """A pyramid of sides that divide one another."""
    factors = draw(st.lists(st.sampled_from([(2, 1), (1, 2), (2, 2), (3, 2)]), min_size=0, max_size=2))
    scales = [(draw(st.integers(1, 2)), draw(st.integers(1, 2)))]
    for rows, columns in factors:
        scales.append((scales[-1][0] * rows, scales[-1][1] * columns))
    return pyramid(scales[-1], tuple(scales))


layouts = st.one_of(partitions().map(lambda drawn: drawn[2]), pyramids())


@anytime
@given(layouts)
def test_no_entity_sees_a_later_one_and_each_sees_itself_whole(layout):
    mask = layout.mask()
    for entity, (start, stop) in enumerate(pairwise(layout.bounds)):
        assert (layout.entity_of[start:stop] == entity).all()
        assert mask[start:stop, :stop].all()
        assert not mask[start:stop, stop:].any()


@anytime
@given(layouts, st.data())
def test_rows_of_the_mask_are_those_of_the_whole_mask(layout, data):
    stop = data.draw(st.integers(1, layout.length))
    start = data.draw(st.integers(0, stop - 1))
    assert torch.equal(layout.mask(start, stop), layout.mask()[start:stop, :stop])


@anytime
@given(partitions())
def test_the_permutation_is_a_bijection_and_back(drawn):
    grid, _, layout = drawn
    assert torch.equal(layout.permutation.sort().values, torch.arange(math.prod(grid)))
    latents = torch.randn(2, math.prod(grid), 3)
    assert torch.equal(layout.to_raster(layout.to_sequence(latents)), latents)
    positions = torch.cat([layout.raster_positions(e) for e in range(layout.num_entities)])
    assert torch.equal(positions, layout.permutation)


@anytime
@given(partitions())
def test_coordinates_follow_the_tokens(drawn):
    grid, _, layout = drawn
    coordinates = layout.to_sequence(grid_positions(grid)[None].float())[0]
    assert torch.equal(coordinates.double(), layout.coordinates)


def extents(layout) -> set[tuple[int, ...]]:
    """(rows, columns) of the bounding rectangles of the entities."""
    parts = [layout.coordinates[start:stop] for start, stop in pairwise(layout.bounds)]
    return {tuple((part.amax(0) - part.amin(0) + 1).int().tolist()) for part in parts}


@anytime
@given(partitions([cells]))
def test_cells_are_compact(drawn):
    _, size, layout = drawn
    assert set(layout.sizes) == {math.prod(size)}
    assert extents(layout) == {size}


@anytime
@given(partitions([subsamples]))
def test_subsamples_span_the_grid(drawn):
    grid, step, layout = drawn
    assert layout.num_entities == math.prod(step)
    assert extents(layout) == {(grid[0] - step[0] + 1, grid[1] - step[1] + 1)}


@anytime
@given(pyramids())
def test_a_pyramid_ends_with_the_tokens(layout):
    latents = torch.randn(2, math.prod(layout.grid), 3)
    sequence = layout.to_sequence(latents)
    assert sequence.shape == (2, layout.length, 3)
    assert torch.equal(layout.to_raster(sequence), latents)
    for start, stop in pairwise(layout.bounds):
        torch.testing.assert_close(sequence[:, start:stop].mean(1), latents.mean(1))
        centre = torch.tensor([(side - 1) / 2 for side in layout.grid], dtype=torch.float64)
        torch.testing.assert_close(layout.coordinates[start:stop].mean(0), centre)
    final = layout.num_entities - 1
    assert torch.equal(layout.raster_positions(final), torch.arange(math.prod(layout.grid)))
    assert all(not len(layout.raster_positions(entity)) for entity in range(final))


def test_the_cells_of_xar():
    layout = LayoutConfig().build(spec((16, 16)))
    row, column = grid_positions((16, 16)).unbind(-1)
    cell = 2 * (row // 8) + column // 8
    index = cell * 64 + (row % 8) * 8 + column % 8
    assert torch.equal(layout.permutation.argsort(), index)
    assert layout.sizes == (64, 64, 64, 64)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LayoutConfig("token"), (1,) * 24),
        (LayoutConfig("cell", 2), (4,) * 6),
        (LayoutConfig("cell", (4, 3)), (12,) * 2),
        (LayoutConfig("subsample", 2), (6,) * 4),
        (LayoutConfig("scale", scales=(1, 2, (4, 6))), (1, 4, 24)),
        (LayoutConfig("image"), (24,)),
    ],
)
def test_entities_of_a_grid(config, sizes):
    assert config.build(spec((4, 6))).sizes == sizes


def test_a_plain_sequence_is_a_raster_of_one_row():
    plain = TokenSpec(12, None, dim=3)
    assert LayoutConfig("cell", 4).build(plain).sizes == (4, 4, 4)
    assert LayoutConfig("subsample", 4).build(plain).permutation.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert LayoutConfig("scale", scales=(3, 12)).build(plain).sizes == (3, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayoutConfig("cell", 3).build(spec((4, 6))), "cell of 3x3 does not divide the token grid 4x6"),
        (lambda: LayoutConfig("cell", 8).build(spec((4, 4))), "cell of 8x8 does not divide"),
        (lambda: LayoutConfig("subsample", 4).build(spec((4, 6))), "subsample of 4x4 does not divide"),
        (lambda: LayoutConfig("scale", scales=(1, 3, 4)).build(spec((4, 4))), "scale of 3x3 does not divide"),
        (lambda: LayoutConfig("scale", scales=(1, 2)).build(spec((4, 4))), "last scale must be the token grid"),
        (lambda: LayoutConfig("scale", scales=(2, 1, 4)).build(spec((4, 4))), "must grow"),
        (lambda: LayoutConfig("scale"), "needs scales"),
        (lambda: LayoutConfig("cell", scales=(1, 2)), "no other has them"),
        (lambda: LayoutConfig("cell", 0), "at least 1, got 0"),
        (lambda: LayoutConfig().build(TokenSpec(8, None, 3, grid=(2, 2, 2))), "tokens of an image"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
