"""Multi-head attention, once for all systems: full or causal, with rotary positions and a key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.flex import FlexMask, LiveKeys
from vistok.nn.rotary import Rotation, rotate

Mask = Tensor | FlexMask | LiveKeys
"""Bool, broadcastable to (B, H, N, keys), True where attention is allowed; or a rule (``vistok.nn.flex``)."""


class LayerCache(Protocol):
    """The keys and values that one attention layer has seen."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, n, h) new keys and values; return all of them, (B, H, past + n, h)."""


class GrowingCache:
    """The keys and values of one layer, for a sequence of unknown length: the cache grows with every call."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, n, h) keys and values; return all so far."""
        if self._seen is not None:
            keys, values = self._seen
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        self._seen = key, value
        return self._seen


class Attention(nn.Module):
    """Self-attention over (B, N, D) with one fused projection, whose rows are ordered query, key, value.

    Args:
        dim: width D.
        num_heads: number of heads H.
        num_kv_heads: heads of keys and values (grouped-query attention, arXiv 2305.13245); must divide H. Consecutive
            query heads share one. None is H.
        head_dim: channels h of a head; ``dim // num_heads`` if None.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: builds the norm of queries and of keys, each over ``head_dim``; None is no norm.
        scale: factor of the logits; ``head_dim ** -0.5`` if None.
        project: False leaves the output projection out (then ``num_heads * head_dim`` must equal ``dim``).
        attn_drop, proj_drop: dropout of the attention weights and of the output, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        project: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim or dim // num_heads, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} must divide num_heads {num_heads}")
        inner = self.num_heads * self.head_dim
        if not project and inner != dim:
            raise ValueError(f"without an output projection num_heads * head_dim = {inner} must equal dim {dim}")
        self.qkv = nn.Linear(dim, inner + 2 * self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (qk_norm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(inner, dim, bias=out_bias) if project else nn.Identity()
        self.attn_drop, self.proj_drop = attn_drop, nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend within x (B, N, D), or from x to everything in ``cache`` and itself.

        Args:
            mask: bool, broadcastable to (B, H, N, keys), True where attention is allowed; or a rule, without dropout.
            causal: each position sees itself and earlier ones; give either this or ``mask``.
            rotation: rotary tables of these N positions, applied to queries and keys.
        """
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None and self.num_kv_heads == self.num_heads:
            q, k = rotate(torch.stack([q, k]), rotation)  # half as many operations: faster for a single token
        elif rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.num_kv_heads != self.num_heads:
            k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for x in (k, v))
        dropout = self.attn_drop if self.training else 0.0
        return self.proj_drop(self.out(attend(q, k, v, mask=mask, causal=causal, dropout=dropout, scale=self.scale)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, h), keys and values (B, num_kv_heads, N, h) of x (B, N, D)."""
        # Plain views instead of einops, which takes three times as long for a single token.
        if self.num_kv_heads == self.num_heads:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
            return q, k, v
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(heads, 1)
        return q, k, v


class CrossAttention(nn.Module):
    """Attention from x (B, N, D) to a context (B, M, D), with one projection for queries and one for keys and values.

    Args:
        dim: width D of x and of the context.
        num_heads: number of heads.
        qk_norm: as in ``Attention``.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: Callable[[int], nn.Module] | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (qk_norm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, *, rotation: Rotation | None = None) -> Tensor:
        """Attend from x (B, N, D) to all of the context (B, M, D); ``rotation`` applies only to the queries."""
        q = self.q_norm(rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads))
        k, v = rearrange(self.kv(context), "b m (two h d) -> two b h m d", two=2, h=self.num_heads)
        if rotation is not None:
            q = rotate(q, rotation)
        return self.out(attend(q, self.k_norm(k), v))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention of (B, H, n, h) queries over (B, H, m, h) keys -> (B, n, H * h)."""
    if isinstance(mask, (FlexMask, LiveKeys)):  # a union of types breaks graphs of PyTorch 2.9
        return rearrange(mask.attend(q, k, v, scale), "b h n d -> b n (h d)")
    # One query sees every key of the cache: no mask, which keeps SDPA on its fast path.
    causal = causal and q.shape[2] > 1
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[2]} causal queries over {k.shape[2]} keys need an explicit mask")
    options: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout, "is_causal": causal, "scale": scale}
    if q.device.type == "cpu" and q.requires_grad and torch.is_autocast_enabled("cpu"):
        # On CPUs the backward pass of the bfloat16 kernel takes several times as long as that in float32.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    elif q.dtype != k.dtype:  # a cache may be more precise
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, **options).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2).flatten(2)
