"""Sampling grids twice as high and wide as those that a RandAR was trained on, without training (arXiv 2412.01827).

A sample of the trained size is placed on the even rows and columns of the larger grid; the tokens between are then
generated in a random order, and all see this sample. The RoPE of the larger grid mixes two ways: the fastest
frequencies of each axis are extrapolated, which keeps neighbours apart, and the others are interpolated to the range of
angles in training.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vistok.draws import Keys
from vistok.generators.engine.packed import DecodingCopies
from vistok.generators.randar.model import RandAR
from vistok.nn.rotary import FixedRotation, Rotation, grid_positions
from vistok.types import Condition, TokenSpec

EXTRAPOLATED = 2
"""The number of extrapolated frequencies of each axis, as in the released code."""


def enlarged(model: RandAR, extrapolated: int = EXTRAPOLATED) -> RandAR:
    """A view of ``model`` for sampling grids of twice the sides; it shares the weights.

    Args:
        extrapolated: how many of the fastest frequencies of each axis keep their speed, from 0 to all.

    Raises:
        ValueError: tokens without a raster, or more frequencies than there are.
    """
    grid = model.spec.grid
    if model.position_kind != "rope2d" or grid is None or len(grid) != 2:
        raise ValueError(
            f"larger grids need tokens that are rotated by row and column; these are {model.spec.length} of grid "
            f"{grid} with positions {model.position_kind!r}"
        )
    pairs = model.rotation.cos.shape[1] // 2  # of each axis
    if not 0 <= extrapolated <= pairs:
        raise ValueError(f"extrapolated must lie in 0..{pairs}, the frequencies of an axis; got {extrapolated}")
    sides = (2 * grid[0], 2 * grid[1])
    view = copy.copy(model)
    view.spec = TokenSpec(4 * model.spec.length, model.spec.codebook_size, model.spec.dim, grid=sides)
    view.decoding_copies = DecodingCopies()  # the model's own copies have the rotations of the small grid
    rotation = FixedRotation(_rotation(grid, pairs, model.rope_base, extrapolated))
    view._modules = dict(model._modules) | {"rotation": rotation.to(model.rotation.cos.device)}
    return view


def _rotation(grid: tuple[int, int], pairs: int, base: float, extrapolated: int) -> Rotation:
    """The rotations of the class (zero) and of all places of the larger grid, (1 + 4 L, head_dim / 2)."""
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    slower = [torch.where(torch.arange(pairs) < extrapolated, 1.0, (side - 1) / (2 * side - 1)) for side in grid]
    places = grid_positions((2 * grid[0], 2 * grid[1])).double()  # (4 L, 2)
    angles = (places[..., None] * torch.stack(slower) * frequencies).flatten(1)
    tables = (angles.cos().float(), angles.sin().float())
    return Rotation(*(torch.cat([table.new_zeros(1, table.shape[1]), table]) for table in tables))


def even_places(grid: tuple[int, ...]) -> Tensor:
    """(4 L,) bool, True at the places in even rows and columns of the grid of twice the sides."""
    rows, columns = grid_positions((2 * grid[0], 2 * grid[1])).unbind(1)
    return (rows % 2 == 0) & (columns % 2 == 0)


@torch.no_grad()
def sample_larger(
    model: RandAR, condition: Condition, options: Any = None, *, keys: Keys, extrapolated: int = EXTRAPOLATED
) -> Tensor:
    """Ids (B, 4 L) of a grid of twice the sides: first a sample of the trained size, then all tokens between.

    A tokenizer that decodes other sizes renders them: ``tokenizer.decode(ids, grid=(2 * h, 2 * w))``.

    Args:
        options: of both parts. ``num_steps`` is that of the first part; the second has three times as many tokens and
            steps.
        keys: of the samples.

    Raises:
        ValueError: as in ``enlarged``, or ``group_sizes``, which fit one grid only.
    """
    options = options or model.options_type()
    if options.group_sizes is not None:
        raise ValueError("a larger grid is generated in two parts; give num_steps, not group_sizes")
    view = enlarged(model, extrapolated)
    coarse = model.sample(condition, options, draws=model.sampling_draws(keys, options))
    even = even_places(model.spec.raster).to(coarse.device)
    ids = coarse.new_zeros(len(coarse), view.spec.length)
    ids[:, even] = coarse
    if options.num_steps is not None:
        options = replace(options, num_steps=4 * options.num_steps)
    draws = view.sampling_draws(replace(keys, step=keys.step + 1), options)
    return view.edit(ids, ~even, condition, options, draws=draws)
