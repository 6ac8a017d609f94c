"""The plain pre-norm block of vision transformers (arXiv 2010.11929), with the options of DINOv2 (arXiv 2304.07193)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.attention import Attention, LayerCache
from vistok.nn.mlp import MLP, GatedMLP, two_thirds
from vistok.signatures import check_least

FeedForward = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class TransformerSize:
    """Width, number of layers, and heads of one transformer.

    Raises:
        ValueError: the heads do not divide the width, or a number is below 1.
    """

    dim: int
    num_layers: int
    num_heads: int

    def __post_init__(self) -> None:
        check_least(self, dim=1, num_layers=1, num_heads=1)
        if self.dim % self.num_heads:
            raise ValueError(f"a width of {self.dim} cannot be split into {self.num_heads} heads")


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for whole samples, and scales up the others
    (arXiv 1603.09382).

    Args:
        rate: share of the samples whose branch is dropped, in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class LayerScale(nn.Module):
    """A learned factor per channel, ``init`` at first (arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTBlock(nn.Module):
    """Layer norm and attention, layer norm and feed-forward, each with a residual: (B, N, D) -> same.

    Args:
        dim: width D.
        num_heads: heads; must divide dim.
        mlp_ratio: hidden width of the feed-forward, in units of dim.
        feed_forward: "gelu" has one hidden layer with exact GELU; "swiglu" has a gated one with biases and two thirds
            of that width, rounded up to a multiple of 8.
        eps: of the layer norms.
        qkv_bias: whether queries, keys and values have biases.
        layer_scale: first value of the learned factors of both branches; None leaves them out.
        drop_path: share of samples whose branch is dropped in training.
        attn_drop, proj_drop: dropout of the attention weights, and of the outputs of attention and feed-forward.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        feed_forward: FeedForward = "gelu",
        eps: float = 1e-6,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = nn.LayerNorm(dim, eps)
        hidden_dim = int(dim * mlp_ratio)
        self.mlp: MLP | GatedMLP
        if feed_forward == "gelu":
            self.mlp = MLP(dim, hidden_dim, F.gelu, drop=proj_drop)
        elif feed_forward == "swiglu":
            self.mlp = GatedMLP(dim, two_thirds(hidden_dim, 8), F.silu, drop=proj_drop)
        else:
            raise ValueError(f"feed_forward must be 'gelu' or 'swiglu', got {feed_forward!r}")
        self.scale1, self.scale2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False, cache: LayerCache | None = None
    ) -> Tensor:
        """``mask``, ``causal`` and ``cache`` are those of ``Attention``."""
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), mask=mask, causal=causal, cache=cache)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
