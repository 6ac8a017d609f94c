"""Losses of generators that predict bits (Infinity, arXiv 2412.04431, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def bit_cross_entropy(logits: Tensor, bits: Tensor, scales: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Cross entropy in nats per bit: the mean over bits, positions and the batch.

    Args:
        logits: (B, L, 2 d), the logits of 0 and 1 for each bit in turn.
        bits: (B, L, d).
        scales: the (h, w) grids of the positions; a position of a grid has the weight 1 / sqrt(h w). None weights all
            positions equally.

    Raises:
        ValueError: the shapes do not fit.
    """
    per_position = _per_bit(logits, bits).mean(-1)  # (B, L)
    if scales is None:
        return per_position.mean()
    areas = torch.tensor([math.prod(scale) for scale in scales])
    if int(areas.sum()) != bits.shape[1]:
        raise ValueError(f"the scales hold {int(areas.sum())} positions, the bits {bits.shape[1]}")
    weights = areas.rsqrt().repeat_interleave(areas).to(per_position)
    return (per_position @ (weights / weights.sum())).mean()


def _per_bit(logits: Tensor, bits: Tensor) -> Tensor:
    """The cross entropies (B, L, d) of bits in nats."""
    if logits.shape != (*bits.shape[:2], 2 * bits.shape[2]):
        raise ValueError(f"bits {tuple(bits.shape)} need logits of twice their width, got {tuple(logits.shape)}")
    pairs = logits.float().unflatten(-1, (-1, 2))  # (B, L, d, 2)
    return F.cross_entropy(pairs.flatten(0, 2), bits.long().flatten(), reduction="none").view(bits.shape)


def bit_accuracy(logits: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of correct bits, and of positions with only correct bits, from logits (B, L, 2 d) and bits
    (B, L, d)."""
    right = logits.unflatten(-1, (-1, 2)).argmax(-1) == bits
    return right.float().mean(), right.all(-1).float().mean()
