"""Multi-head self-attention, once for all systems: full or causal, with rotary positions and a key/value cache."""

from __future__ import annotations

from typing import Protocol

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.rotary import Rotation, rotate


class LayerCache(Protocol):
    """The keys and values that one attention layer has seen."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, n, h) new keys and values; return all of them, (B, H, past + n, h)."""


class Attention(nn.Module):
    """Self-attention over (B, N, D) with one fused projection, its rows ordered query, key, value.

    Args:
        dim: width D.
        heads: number of heads H.
        head_dim: channels h of a head; ``dim // heads`` if None.
        qkv_bias, out_bias: whether the projections have biases.
        project: False leaves the output projection out (then ``heads * head_dim`` must equal ``dim``).
        dropout: dropout of the attention weights and of the output, in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        project: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        inner = self.heads * self.head_dim
        if not project and inner != dim:
            raise ValueError(f"without an output projection heads * head_dim = {inner} must equal dim {dim}")
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.out = nn.Linear(inner, dim, bias=out_bias) if project else nn.Identity()
        self.attention_dropout, self.dropout = attention_dropout, nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend within x (B, N, D), or from x to everything in ``cache`` and itself.

        Args:
            mask: bool, broadcastable to (B, H, N, keys), True where attention is allowed.
            causal: each position sees itself and earlier ones; give either this or ``mask``.
            rotation: rotary tables of these N positions, applied to queries and keys.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.dropout(self.out(attend(q, k, v, mask, causal, self.attention_dropout if self.training else 0.0)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention of (B, H, n, h) queries over (B, H, m, h) keys -> (B, n, H * h)."""
    # One query sees every key of the cache: no mask, which keeps SDPA on its fast path.
    causal = causal and q.shape[2] > 1
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[2]} causal queries over {k.shape[2]} keys need an explicit mask")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return rearrange(out, "b h n d -> b n (h d)")
