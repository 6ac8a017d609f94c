"""The three transformers of MingTok: low-level encoder, causal semantic decoder, pixel decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.attention import GrowingCache
from vistok.nn.containers import ModuleList
from vistok.nn.positions import resized_grid
from vistok.nn.vit import FeedForward, TransformerSize, ViTBlock

EPS = 1e-6
POSITION_OFFSET = 0.1
"""``offset`` with which the released encoder resizes its position table, see ``resized_grid``."""


@dataclass(frozen=True)
class StageConfig(TransformerSize):
    """The size of one of the transformers.

    Attributes:
        feed_forward: as in ``ViTBlock``.
    """

    feed_forward: FeedForward = "gelu"

    def blocks(self) -> ModuleList:
        """The blocks of the transformer: pre-norm, without positions."""
        return ModuleList(
            ViTBlock(self.dim, self.num_heads, eps=EPS, feed_forward=self.feed_forward) for _ in range(self.num_layers)
        )


class LowLevelEncoder(nn.Module):
    """Pixels (B, C, H, W) to raw latents (B, N + 1, d): those of the patches in raster order, then the class latent.

    Args:
        config: the transformer.
        grid: (h, w) patches that the position table is made for; other grids resize it.
        patch_size: side of a patch.
        in_channels: C.
        latent_dim: d; must divide the width.
        has_mask_token: whether patches can be masked.
    """

    def __init__(
        self,
        config: StageConfig,
        grid: tuple[int, int],
        patch_size: int,
        in_channels: int,
        latent_dim: int,
        *,
        has_mask_token: bool,
    ):
        super().__init__()
        if config.dim % latent_dim:
            raise ValueError(f"latent_dim {latent_dim} must divide the encoder's dim {config.dim}")
        self.grid, self.latent_dim = grid, latent_dim
        self.patches = nn.Conv2d(in_channels, config.dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(config.dim)) if has_mask_token else None
        self.blocks = config.blocks()
        self.norm = nn.LayerNorm(config.dim, EPS)
        self.output = nn.Linear(config.dim, latent_dim)

    def embed(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """Patches, class token and positions, (B, N + 1, D).

        Args:
            masked: (B, N) bool, True where the mask token takes the place of the patch.
        """
        patches = self.patches(pixels)  # (B, D, h, w)
        grid = tuple(patches.shape[2:])
        patches = patches.flatten(2).mT  # (B, N, D)
        if masked is not None and self.mask_token is not None:
            patches = torch.where(masked[..., None], self.mask_token.to(patches.dtype), patches)
        cells, last = self.positions[:, :-1], self.positions[:, -1:]
        positions = torch.cat([resized_grid(cells, self.grid, grid, offset=POSITION_OFFSET), last], 1)
        return torch.cat([patches, self.class_token.expand(len(patches), -1, -1)], 1) + positions

    def transform(self, x: Tensor) -> Tensor:
        """The residual stream (B, N + 1, D) after the last block."""
        for block in self.blocks:
            x = block(x)
        return x

    def project(self, hidden: Tensor) -> Tensor:
        """Raw latents (B, N + 1, d): means of groups of neighbouring channels, plus a projection of the stream."""
        groups = hidden.unflatten(-1, (self.latent_dim, -1)).mean(-1)
        return groups + self.output(F.gelu(self.norm(hidden)))

    def forward(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        return self.project(self.transform(self.embed(pixels, masked)))


class SemanticDecoder(nn.Module):
    """Raw latents (B, n, d) to semantic features (B, n, D), each computed from its own and earlier latents.

    There are no positions: the causal mask alone determines the order of the latents.

    Args:
        config: the transformer; its width must be a multiple of ``latent_dim``.
        latent_dim: d.
    """

    def __init__(self, config: StageConfig, latent_dim: int):
        super().__init__()
        if config.dim % latent_dim:
            raise ValueError(f"the semantic decoder's dim {config.dim} must be a multiple of latent_dim {latent_dim}")
        self.copies = config.dim // latent_dim
        self.input = nn.Linear(latent_dim, config.dim)
        self.blocks = config.blocks()
        self.norm = nn.LayerNorm(config.dim, EPS)

    def embed(self, latents: Tensor) -> Tensor:
        """The input of the blocks (B, n, D): a projection of the latents, plus each channel repeated."""
        return self.input(latents) + latents.repeat_interleave(self.copies, -1)

    def forward(self, latents: Tensor, past: int = 0, caches: Sequence[GrowingCache] | None = None) -> Tensor:
        """Expand latents (B, n, d).

        Args:
            past: number of latents in the caches.
            caches: one per block, to which these latents are appended; None has no cache.
        """
        x, count = self.embed(latents), latents.shape[1]
        mask = None
        if past and count > 1:
            mask = torch.ones(count, past + count, dtype=torch.bool, device=x.device).tril(past)
        each: Sequence[GrowingCache | None] = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks, each, strict=True):
            x = block(x, mask=mask, causal=mask is None, cache=cache)
        return self.norm(x)


class PixelDecoder(nn.Module):
    """Semantic features (B, h * w, D) of a grid to pixels (B, C, H, W); each feature becomes r x r finer tokens.

    Args:
        config: the transformer.
        semantic_dim: D.
        ratio: r, finer tokens per side of a semantic feature.
        patch_size: side of the patch of a finer token.
        in_channels: C.
    """

    def __init__(self, config: StageConfig, semantic_dim: int, ratio: int, patch_size: int, in_channels: int):
        super().__init__()
        self.ratio, self.patch_size, self.in_channels = ratio, patch_size, in_channels
        self.spread_out = nn.Linear(semantic_dim, config.dim * ratio**2)
        self.blocks = config.blocks()
        self.norm = nn.LayerNorm(config.dim, EPS)
        self.head = nn.Linear(config.dim, in_channels * patch_size**2)

    def spread(self, semantic: Tensor, grid: tuple[int, int]) -> Tensor:
        """The finer tokens (B, r h * r w, D') in raster order."""
        cells = self.spread_out(semantic)
        r = self.ratio
        return rearrange(cells, "b (h w) (y x c) -> b (h y w x) c", h=grid[0], w=grid[1], y=r, x=r)

    def patches(self, tokens: Tensor) -> Tensor:
        """Finer tokens (B, P, D') to the pixels of their patches (B, P, p * p * C)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))

    def join(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels (B, C, H, W) of patches (B, r h * r w, p * p * C), channels fastest; ``grid`` is (h, w)."""
        p, h = self.patch_size, grid[0] * self.ratio
        return rearrange(patches, "b (h w) (y x c) -> b c (h y) (w x)", h=h, y=p, x=p, c=self.in_channels)

    def forward(self, semantic: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.join(self.patches(self.spread(semantic, grid)), grid)
