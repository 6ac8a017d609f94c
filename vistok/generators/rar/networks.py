"""The blocks of RAR (arXiv 2411.00776): attention and feed-forward, modulated by a condition per position."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vistok.generators.engine.cache import CachedLayer
from vistok.nn.attention import Attention
from vistok.nn.mlp import MLP
from vistok.nn.modulation import modulate, modulation

NORM_EPS = 1e-6
layer_norm = partial(nn.LayerNorm, eps=NORM_EPS)


class RARBlock(nn.Module):
    """Pre-norm block of causal attention and feed-forward (exact GELU) with adaptive norms: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, attn_drop: float, proj_drop: float):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads, qk_norm=layer_norm, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = layer_norm(dim)
        self.mlp = MLP(dim, mlp_dim, F.gelu, drop=proj_drop)
        self.modulation = modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, cache: CachedLayer | None) -> Tensor:
        """``condition`` is (B, N, D): each position has its own."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        attended = self.attn(modulate(self.norm1(x), shift1, scale1), mask=mask, causal=mask is None, cache=cache)
        x = x + gate1 * attended
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
