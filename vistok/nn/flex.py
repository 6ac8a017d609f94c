"""Masks given by a rule instead of a tensor: FlexAttention skips the blocks that the rule excludes.

Made for GPUs, where a dense mask costs memory and rules out the fused kernels. Dropout is not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

FEWEST_CHANNELS = 16
"""Heads with fewer channels are not compiled for GPUs."""

QUERIES_PER_BLOCK, KEYS_PER_BLOCK = 128, 64


class FlexMask:
    """Attention of L positions to one another under ``rule(batch, head, query, key)``, True where it is allowed."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], length: int, device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask

        self._blocks = create_block_mask(rule, None, None, length, length, device=device)
        self._attention = _flex_attention(device.type == "cuda")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Queries, keys and values (B, H, L, h) to (B, H, L, h)."""
        return self._attention(q, k, v, block_mask=self._blocks, scale=scale)


class LiveKeys(NamedTuple):
    """The mask of a single query over a static cache: it attends to the keys up to its own position. Unlike with a
    dense mask, later keys are not read at all. For use inside compiled code.

    Attributes:
        last: (1,) int64, position of the query.
        num_blocks: (1, 1, 1) int32, the number of blocks of ``KEYS_PER_BLOCK`` keys up to ``last``.
        blocks: (1, 1, 1, N) int32, the indices of all blocks.
        visible: bool (B or 1, 1, 1, L), which of the L keys may be attended to; None is all.
    """

    last: Tensor
    num_blocks: Tensor
    blocks: Tensor
    visible: Tensor | None

    @classmethod
    def up_to(cls, last: Tensor, length: int, visible: Tensor | None) -> Self:
        """The keys up to position ``last`` (1,) of a cache of ``length``."""
        blocks = torch.arange(-(-length // KEYS_PER_BLOCK), dtype=torch.int32, device=last.device)
        return cls(last, (last // KEYS_PER_BLOCK + 1).int().view(1, 1, 1), blocks.view(1, 1, 1, -1), visible)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """A query (B, H, 1, h), keys and values (B, H, L, h) to (B, H, 1, h)."""
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        last = self.last.squeeze(0)
        visible = None if self.visible is None else self.visible.expand(len(q), 1, 1, k.shape[2])[:, 0, 0]

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= last if visible is None else (key <= last) & visible[row, key]

        mask = BlockMask.from_kv_blocks(
            self.num_blocks,
            self.blocks,
            BLOCK_SIZE=(QUERIES_PER_BLOCK, KEYS_PER_BLOCK),
            mask_mod=seen,
            seq_lengths=(1, k.shape[2]),
            compute_q_blocks=False,  # only the backward pass needs them
        )
        return flex_attention(q, k, v, block_mask=mask, scale=scale)


def block_causal(group_of: Tensor) -> FlexMask:
    """Each position attends to its own group and all groups before it; ``group_of`` (L,) holds their numbers."""
    return FlexMask(lambda b, h, query, key: group_of[query] >= group_of[key], len(group_of), group_of.device)


@cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, it computes the dense matrix: correct, but slow.
    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention) if compiled else attention
