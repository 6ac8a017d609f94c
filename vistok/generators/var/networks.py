"""The blocks of VAR (arXiv 2404.02905, section 3.3): adaptive norms, and attention of L2-normalised vectors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.generators.engine.cache import CachedLayer
from vistok.nn.attention import Attention
from vistok.nn.mlp import MLP
from vistok.nn.modulation import modulate, modulation
from vistok.nn.vit import DropPath

MAX_LOG_SCALE = math.log(100)


class UnitNorm(nn.Module):
    """Vectors (..., h), L2-normalised."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class ScaledUnitNorm(nn.Module):
    """Vectors (B, H, N, h), scaled to a learned length per head, at most 100."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.log_scale.clamp_max(MAX_LOG_SCALE).exp()


class QVBiasAttention(Attention):
    """Attention with biases of queries and values, but not of keys.

    Args:
        dim, num_heads, attn_drop, proj_drop: as in ``Attention``.
        l2_norm: logits are the cosines of queries and keys, times a learned scale per head. Otherwise they are the
            products times 0.25 / sqrt(head dim).
    """

    def __init__(self, dim: int, num_heads: int, *, l2_norm: bool, attn_drop: float, proj_drop: float):
        options: dict[str, Any] = {"qkv_bias": False, "attn_drop": attn_drop, "proj_drop": proj_drop}
        super().__init__(dim, num_heads, **options, scale=1.0 if l2_norm else 0.25 / math.sqrt(dim // num_heads))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        if l2_norm:
            self.q_norm, self.k_norm = ScaledUnitNorm(num_heads), UnitNorm()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(x)
        heads = (self.num_heads, 1, self.head_dim)
        return q + self.q_bias.view(heads), k, v + self.v_bias.view(heads)


class OwnModulation(nn.Module):
    """Six modulation vectors (R, 1, 6, D) that a block's own layer makes from the class (R, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.modulation = modulation(dim, 6)

    def forward(self, condition: Tensor) -> Tensor:
        return self.modulation(condition).unflatten(-1, (6, -1))[:, None]


class SharedModulation(nn.Module):
    """Six modulation vectors (R, 1, 6, D): those that all blocks share (R, 6 D), plus offsets of this block."""

    def __init__(self, dim: int):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(1, 1, 6, dim))

    def forward(self, condition: Tensor) -> Tensor:
        return self.offsets + condition.unflatten(-1, (6, -1))[:, None]


class VARBlock(nn.Module):
    """Pre-norm block of attention and feed-forward (GELU, tanh) with adaptive norms: (R, N, D) -> same.

    Args:
        dim, num_heads: width and heads.
        mlp_ratio: hidden width of the feed-forward, in units of dim.
        shared_modulation: ``SharedModulation`` in place of ``OwnModulation``.
        l2_norm, attn_drop: see ``QVBiasAttention``.
        proj_drop: dropout of the outputs of attention and feed-forward, and of the feed-forward's hidden layer.
        drop_path: share of samples whose branches are left out in training.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        shared_modulation: bool,
        l2_norm: bool,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
        eps: float,
    ):
        super().__init__()
        norm = partial(nn.LayerNorm, dim, eps=eps, elementwise_affine=False)
        self.norm1, self.norm2 = norm(), norm()
        self.attn = QVBiasAttention(dim, num_heads, l2_norm=l2_norm, attn_drop=attn_drop, proj_drop=proj_drop)
        self.mlp = MLP(dim, round(dim * mlp_ratio), partial(F.gelu, approximate="tanh"), drop=proj_drop)
        self.modulation = (SharedModulation if shared_modulation else OwnModulation)(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, cache: CachedLayer | None) -> Tensor:
        """``mask`` is that of ``Attention``; with None, all entries and the whole cache are attended to."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(condition).unbind(2)  # (R, 1, D) each
        attended = self.attn(modulate(self.norm1(x), shift1, scale1), mask=mask, cache=cache)
        x = x + self.drop_path(gate1 * attended)
        return x + self.drop_path(gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2)))
