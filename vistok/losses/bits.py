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
        logits: (B, L, 2 d), those of 0 and of 1 of each bit side by side.
        bits: (B, L, d).
        scales: the grids of the positions; those of a grid then weigh 1 / sqrt(its area). None weighs all alike.

    Raises:
        ValueError: shapes that do not fit.
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
    """(B, L, d) cross entropies."""
    if logits.shape != (*bits.shape[:2], 2 * bits.shape[2]):
        raise ValueError(f"bits {tuple(bits.shape)} need logits of twice their width, got {tuple(logits.shape)}")
    pairs = logits.float().unflatten(-1, (-1, 2))  # (B, L, d, 2)
    return F.cross_entropy(pairs.flatten(0, 2), bits.long().flatten(), reduction="none").view(bits.shape)


def bit_accuracy(logits: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The share of right bits, and of positions whose bits are all right; of logits and bits as above."""
    right = logits.unflatten(-1, (-1, 2)).argmax(-1) == bits
    return right.float().mean(), right.all(-1).float().mean()
