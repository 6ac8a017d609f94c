"""Linear layers for a few rows at a time on a GPU, as in the compiled steps of cached sampling.

Such a product takes as long as reading the weight does, if all of the GPU reads. Libraries' kernels take 64 outputs of
a layer per multiprocessor, and most layers have too few for all of them. So the inputs are split into parts, whose
products are added up, and the two layers of a gated feed-forward that take the same input become one.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.generators.engine.copies import is_altered, is_plain_linear, with_layers
from vistok.nn.mlp import GatedMLP

MOST_ROWS = 32
"""The most rows for which a product takes as long as reading the weight does."""

OUTPUTS_AT_A_TIME, FEWEST_INPUTS, MOST_PARTS = 64, 64, 8
"""Compilers add up 8 parts within what comes next, but no more."""


def split_layers(module: nn.Module, rows: int, processors: int) -> nn.Module:
    """A module that computes what this one does in eval mode, by other products where those are faster.

    Parameters are shared, but for the two weights of a gated feed-forward, of which it has a joined copy. How many rows
    and parts pay was tried on an H200.

    Args:
        rows: how many rows a layer is given in all.
        processors: multiprocessors of the GPU.
    """
    if rows > MOST_ROWS:
        return module

    def split(layer: nn.Module) -> nn.Module | None:
        if _is_joinable(layer):
            return JoinedMLP(layer, with_layers(layer.down, split))
        # A single row would be copied for batched products, which takes as long as they save.
        if rows == 1 or not is_plain_linear(layer):
            return None
        parts = number_of_parts(layer.in_features, layer.out_features, processors)
        return SplitLinear(layer, parts) if parts > 1 else None

    return with_layers(module, split)


def number_of_parts(in_features: int, out_features: int, processors: int) -> int:
    """The fewest parts of equal size with which most of a GPU's multiprocessors have something to do."""
    tiles = -(-out_features // OUTPUTS_AT_A_TIME)
    possible = [n for n in range(1, MOST_PARTS + 1) if in_features % (n * FEWEST_INPUTS) == 0]
    return next((n for n in possible if n * tiles >= 0.8 * processors), max(possible, default=1))


class SplitLinear(nn.Module):
    """A linear layer (..., D) -> (..., O) whose inputs are multiplied in ``parts`` parts, and the products added up."""

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
