"""Masks given by a rule instead of a tensor: FlexAttention skips the blocks that the rule excludes.

Made for GPUs, where a dense mask costs memory and forbids the fused kernels. It knows no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

FEWEST_CHANNELS = 16
"""Heads with fewer are not compiled for GPUs."""


class FlexMask:
    """Attention of L positions to one another under ``rule(batch, head, query, key)``, True where it is allowed."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], length: int, device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask

        self._blocks = create_block_mask(rule, None, None, length, length, device=device)
        self._attention = _flex_attention(device.type == "cuda")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Queries, keys and values (B, H, L, h) to (B, H, L, h)."""
        return self._attention(q, k, v, block_mask=self._blocks, scale=scale)


def block_causal(group_of: Tensor) -> FlexMask:
    """Each position sees its own group and all groups before it; ``group_of`` (L,) counts upwards."""
    return FlexMask(lambda b, h, query, key: group_of[query] >= group_of[key], len(group_of), group_of.device)


@cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it computes the dense matrix: right, but only good for comparison.
    return torch.compile(flex_attention) if compiled else flex_attention
