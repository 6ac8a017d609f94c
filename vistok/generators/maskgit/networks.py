"""Bidirectional transformers over [class, tokens]: BERT (arXiv 1810.04805) and U-ViT (arXiv 2209.12152)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.attention import Attention
from vistok.nn.containers import ModuleList
from vistok.nn.mlp import MLP
from vistok.nn.vit import ViTBlock

BERT_EPS, UVIT_EPS = 1e-12, 1e-5


class PostNormBlock(nn.Module):
    """Attention and feed-forward (exact GELU), each normalised after its residual: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, attn_drop: float, proj_drop: float):
        super().__init__()
        self.attn = Attention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm1 = nn.LayerNorm(dim, BERT_EPS)
        self.mlp = MLP(dim, mlp_dim, F.gelu)
        self.norm2 = nn.LayerNorm(dim, BERT_EPS)
        self.dropout = nn.Dropout(proj_drop)  # of the feed-forward's output alone, as in BERT

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Bert(nn.Module):
    """BERT: normed embeddings of tokens, positions and token type, then post-norm blocks: ids (B, N) -> (B, N, D)."""

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(length, dim)
        self.kinds = nn.Embedding(2, dim)  # BERT's token types; all tokens have the first
        self.norm = nn.LayerNorm(dim, BERT_EPS)
        self.dropout = nn.Dropout(proj_drop)
        self.blocks = nn.Sequential(
            *(
                PostNormBlock(dim, num_heads, mlp_dim, attn_drop=attn_drop, proj_drop=proj_drop)
                for _ in range(num_layers)
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]] + self.kinds.weight[0]
        return self.blocks(self.dropout(self.norm(x)))


class UViT(nn.Module):
    """U-ViT: pre-norm blocks with skip connections from the first half to the second: ids (B, N) -> (B, N, D).

    Raises:
        ValueError: an odd number of layers; the middle block, which is not counted, stands between two equal halves.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        if num_layers % 2:
            raise ValueError(f"num_layers of 'uvit' must be even, half of it before the middle block; got {num_layers}")

        def block() -> ViTBlock:
            return ViTBlock(
                dim,
                num_heads,
                mlp_ratio=mlp_dim / dim,
                eps=UVIT_EPS,
                qkv_bias=False,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
            )

        half = num_layers // 2
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.empty(1, length, dim))
        self.in_blocks = ModuleList(block() for _ in range(half))
        self.mid_block = block()
        self.out_blocks = ModuleList(block() for _ in range(half))
        self.skips = ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        self.norm = nn.LayerNorm(dim, UVIT_EPS)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[:, : ids.shape[1]]
        earlier = []
        for block in self.in_blocks:
            x = block(x)
            earlier.append(x)
        x = self.mid_block(x)
        for block, skip in zip(self.out_blocks, self.skips):
            x = block(skip(torch.cat([x, earlier.pop()], -1)))
        return self.norm(x)


NETWORKS = {"bert": Bert, "uvit": UViT}
