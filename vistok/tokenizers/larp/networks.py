"""The networks of LARP: two ViT stacks, and the optional norm before the quantizer."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.nn.positions import FixedClipPositions, LearnedClipPositions, sincos_1d
from vistok.nn.vit import TransformerSize, ViTBlock
from vistok.utils.devices import without_autocast

LatentNorm = Literal["none", "layer_channels", "layer_tokens", "batch_channels", "batch_tokens"]
Table = Literal["fixed", "learned"]


def blocks_of(config: TransformerSize, norm_eps: float) -> nn.Sequential:
    """A stack of blocks without a final norm: (B, N, D) -> (B, N, D)."""
    return nn.Sequential(
        *(ViTBlock(config.dim, config.num_heads, eps=norm_eps, qkv_bias=False) for _ in range(config.num_layers))
    )


class Encoder(nn.Module):
    """Clips to outputs at queries that attend to the patches: (B, C, T, H, W) -> (B, n, D).

    Args:
        config: the transformer.
        grid: (t, h, w) patches of the longest clip.
        patch: (t, h, w) pixels of a patch.
        num_tokens: number of queries n.
        in_channels: channels of the clip.
        positions: whether the patches' positions are fixed or learned.
        learned_queries: whether the queries are trained.
        query_init: "normal" with standard deviation ``query_std``, or "sincos", the sine-cosine table of their index.
        typed: which of "patches" and "queries" get a learned type embedding.
        norm_eps: of the blocks' LayerNorms.
    """

    def __init__(
        self,
        config: TransformerSize,
        grid: tuple[int, int, int],
        patch: tuple[int, int, int],
        num_tokens: int,
        *,
        in_channels: int,
        positions: Table,
        learned_queries: bool,
        query_init: Literal["normal", "sincos"],
        query_std: float,
        typed: frozenset[str],
        norm_eps: float,
    ):
        super().__init__()
        self.to_patches = nn.Conv3d(in_channels, config.dim, patch, patch)
        self.positions = clip_positions(positions, grid, config.dim)
        table = sincos_1d(torch.arange(num_tokens), config.dim).float()
        queries = torch.randn(num_tokens, config.dim) * query_std if query_init == "normal" else table
        self.queries = nn.Parameter(queries, requires_grad=learned_queries)
        self.patch_type = type_vector("patches", typed, config.dim)
        self.query_type = type_vector("queries", typed, config.dim)
        self.blocks = blocks_of(config, norm_eps)

    def embed_patches(self, clips: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) to patches with positions (B, N, D), time first, then rows, then columns."""
        patches = self.to_patches(clips)  # (B, D, t, h, w)
        return patches.flatten(2).transpose(1, 2) + self.positions(patches.shape[2])

    def forward(self, clips: Tensor) -> Tensor:
        patches = plus(self.embed_patches(clips), self.patch_type)
        queries = plus(self.queries, self.query_type).expand(len(clips), -1, -1)
        x = self.blocks(torch.cat([patches, queries], 1))  # (B, N + n, D)
        return x[:, patches.shape[1] :]


class Decoder(nn.Module):
    """Latents to clips, read at patch queries that attend to the latents: (B, n, D) -> (B, C, T, H, W).

    Args:
        config, grid, patch, num_tokens, norm_eps: as in ``Encoder``.
        out_channels: channels of the clip.
        positions: whether the patch queries are fixed or learned position tables.
        latent_positions: whether the latents' positions are fixed (sines and cosines of their index, with the base
            ``latent_position_base``) or learned.
        typed: which of "latents" and "patch_queries" get a learned type embedding.
    """

    latent_positions: Tensor

    def __init__(
        self,
        config: TransformerSize,
        grid: tuple[int, int, int],
        patch: tuple[int, int, int],
        num_tokens: int,
        *,
        out_channels: int,
        positions: Table,
        latent_positions: Table,
        latent_position_base: float,
        typed: frozenset[str],
        norm_eps: float,
    ):
        super().__init__()
        self.grid, self.patch = grid, patch
        if latent_positions == "learned":
            self.latent_positions = nn.Parameter(torch.randn(num_tokens, config.dim) * 0.02)
        else:
            table = sincos_1d(torch.arange(num_tokens), config.dim, base=latent_position_base).float()
            self.register_buffer("latent_positions", table)
        self.positions = clip_positions(positions, grid, config.dim)
        self.latent_type = type_vector("latents", typed, config.dim)
        self.patch_type = type_vector("patch_queries", typed, config.dim)
        self.blocks = blocks_of(config, norm_eps)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.to_pixels = nn.Linear(config.dim, patch[0] * patch[1] * patch[2] * out_channels)

    def forward(self, latents: Tensor, t: int) -> Tensor:
        """Decode latents (B, n, D) to ``t`` patches in time, each of ``patch[0]`` frames."""
        latents = plus(latents + self.latent_positions, self.latent_type)
        queries = plus(self.positions(t)[None], self.patch_type).expand(len(latents), -1, -1)
        x = self.blocks(torch.cat([latents, queries], 1))[:, latents.shape[1] :]  # (B, t * h * w, D)
        (_, h, w), (pt, ph, pw) = self.grid, self.patch
        return rearrange(
            self.to_pixels(self.norm(x)),
            "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            h=h,
            w=w,
            pt=pt,
            ph=ph,
            pw=pw,
        )


def clip_positions(kind: Table, grid: tuple[int, int, int], dim: int) -> nn.Module:
    """The position table of a clip's patches."""
    return (LearnedClipPositions if kind == "learned" else FixedClipPositions)(grid, dim)


def type_vector(kind: str, typed: frozenset[str], dim: int) -> nn.Parameter | None:
    """A learned type embedding (dim,) that all tokens of a kind share; None unless the kind is ``typed``."""
    return nn.Parameter(torch.randn(dim) * 0.02) if kind in typed else None


def plus(x: Tensor, vector: Tensor | None) -> Tensor:
    """``x`` plus the type embedding, if there is one."""
    return x if vector is None else x + vector


class NormOfLatents(nn.Module):
    """A layer norm or batch norm of latents (B, n, d), in float32, before the quantizer.

    Args:
        kind: what the statistics are taken over: "layer_channels" over the d channels of a token; "layer_tokens" over
            tokens and channels of a clip; "batch_channels" over batch and tokens, for each channel; "batch_tokens"
            over the batch, for each channel of each token.
        num_tokens, dim: n and d.
    """

    def __init__(self, kind: LatentNorm, num_tokens: int, dim: int):
        super().__init__()
        makers = {
            "layer_channels": lambda: nn.LayerNorm(dim),
            "layer_tokens": lambda: nn.LayerNorm((num_tokens, dim)),
            "batch_channels": lambda: nn.BatchNorm1d(dim),
            "batch_tokens": lambda: nn.BatchNorm1d(num_tokens * dim),
        }
        if kind not in makers:
            raise ValueError(f"latent_norm is {kind!r}; allowed: 'none', {', '.join(map(repr, makers))}")
        self.kind, self.norm = kind, makers[kind]()

    def forward(self, latents: Tensor) -> Tensor:
        with without_autocast(latents.device):
            x = latents.float()
            if self.kind == "batch_channels":
                return self.norm(x.flatten(0, 1)).view(x.shape)
            if self.kind == "batch_tokens":
                return self.norm(x.flatten(1)).view(x.shape)
            return self.norm(x)
