"""Linear layers for a few rows at a time on a GPU, as in the compiled steps of cached sampling.

Such a product takes as long as reading the weight, if all multiprocessors read. The kernels of libraries compute 64
outputs per multiprocessor, and most layers have too few outputs to occupy all of them. So the inputs are split into
parts whose products are summed, and the two layers of a gated feed-forward that take the same input become one.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.generators.engine.copies import is_altered, is_plain_linear, with_layers
from vistok.nn.mlp import GatedMLP

MOST_ROWS = 32
"""The most rows for which a product takes only as long as reading the weight."""

OUTPUTS_AT_A_TIME, FEWEST_INPUTS, MOST_PARTS = 64, 64, 8
"""Outputs per multiprocessor, fewest inputs per part, most parts: compilers fuse sums of up to 8 parts into the next
operation."""


def split_layers(module: nn.Module, rows: int, processors: int) -> nn.Module:
    """A copy of the module for eval mode, with linear layers replaced if that is faster; the module itself if not.

    Parameters are shared, except that a gated feed-forward gets a joined copy of its gate and up weights. The limits on
    rows and parts were measured on an H200.

    Args:
        rows: the number of rows of a layer's input.
        processors: multiprocessors of the GPU.
    """
    if rows > MOST_ROWS:
        return module

    def split(layer: nn.Module) -> nn.Module | None:
        if _is_joinable(layer):
            return JoinedMLP(layer, with_layers(layer.down, split))
        # Batched products copy a single row, which takes as long as they save.
        if rows == 1 or not is_plain_linear(layer):
            return None
        parts = number_of_parts(layer.in_features, layer.out_features, processors)
        return SplitLinear(layer, parts) if parts > 1 else None

    return with_layers(module, split)


def number_of_parts(in_features: int, out_features: int, processors: int) -> int:
    """The fewest parts of equal size that occupy 80 % of a GPU's multiprocessors, or the most parts possible."""
    tiles = -(-out_features // OUTPUTS_AT_A_TIME)
    possible = [n for n in range(1, MOST_PARTS + 1) if in_features % (n * FEWEST_INPUTS) == 0]
    return next((n for n in possible if n * tiles >= 0.8 * processors), max(possible, default=1))


class SplitLinear(nn.Module):
    """A linear layer (..., D) -> (..., O) that splits its inputs into ``parts`` parts and sums their products."""

    def __init__(self, linear: nn.Linear, parts: int):
        super().__init__()
        self.weight, self.bias, self.parts = linear.weight, linear.bias, parts

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.parts, x.shape[-1] // self.parts).transpose(0, 1)
        weight = self.weight.unflatten(1, (self.parts, -1)).permute(1, 2, 0)
        out = torch.bmm(rows, weight).float().sum(0)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)


class JoinedMLP(nn.Module):
    """A gated feed-forward (..., D) -> (..., D) that multiplies once for gate and up, without dropout."""

    weight: Tensor

    def __init__(self, mlp: GatedMLP, down: nn.Module):
        super().__init__()
        self.down, self.activation = down, mlp.activation
        self.register_buffer("weight", torch.cat([mlp.gate.weight, mlp.up.weight]).detach())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.weight).chunk(2, -1)
        return self.down(self.activation(gate) * up)


def _is_joinable(module: nn.Module) -> TypeGuard[GatedMLP]:
    if not isinstance(module, GatedMLP) or is_altered(module):
        return False
    return is_plain_linear(module.gate) and is_plain_linear(module.up) and module.gate.bias is None
