"""The networks of RobusTok (arXiv 2509.12474): DINOv2's vision transformer as encoder and as decoder."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.containers import ModuleList
from vistok.nn.vit import ViTBlock

Grid = tuple[int, int]
NORM_EPS = 1e-6
LAYER_SCALE = 1e-5


class ViTBackbone(nn.Module):
    """Class token, learned positions, blocks and norm of a vision transformer.

    Args:
        grid: (h, w) of the positions.
        drop_path: rate of the last block; rates rise linearly from 0.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, grid: Grid, drop_path: float):
        super().__init__()
        self.grid = grid
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], dim))
        rates = [drop_path * layer / max(num_layers - 1, 1) for layer in range(num_layers)]
        self.blocks = ModuleList(
            ViTBlock(dim, num_heads, eps=NORM_EPS, layer_scale=LAYER_SCALE, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.normal_(self.class_token, std=1e-6)

    def place(self, tokens: Tensor) -> Tensor:
        """Prepend the class token to tokens (B, n, D) and add positions: (B, 1 + n, D). The tokens lie on the own grid,
        or on a square one."""
        x = torch.cat([self.class_token.to(tokens).expand(len(tokens), -1, -1), tokens], 1)
        return x + self._positions(tokens.shape[1])

    def _positions(self, count: int) -> Tensor:
        if count == self.grid[0] * self.grid[1]:
            return self.positions
        side = math.isqrt(count)
        table = rearrange(self.positions[:, 1:], "1 (h w) d -> 1 d h w", h=self.grid[0])
        table = F.interpolate(table, (side, side), mode="bicubic", antialias=True)
        return torch.cat([self.positions[:, :1], rearrange(table, "1 d h w -> 1 (h w) d")], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks and the norm to x (B, N, D)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Encoder(nn.Module):
    """Pixels (B, C, H, W) to features of the latent tokens, (B, N, D).

    The latent tokens lie on a square raster and share the positions of the patches; a level embedding distinguishes
    them from the patches.
    """

    def __init__(self, backbone: ViTBackbone, dim: int, patch_size: int, in_channels: int, num_tokens: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.latent_tokens = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        self.level_embedding = nn.Embedding(2, dim)
        self.backbone = backbone
        nn.init.trunc_normal_(self.level_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        image = self.backbone.place(rearrange(self.patch_embed(pixels), "b d h w -> b (h w) d"))
        latents = self.backbone.place(self.latent_tokens)[:, 1:].expand(len(image), -1, -1)
        levels = self.level_embedding.weight
        x = self.backbone(torch.cat([image + levels[0], latents + levels[1]], 1))
        return x[:, image.shape[1] :]


class Decoder(nn.Module):
    """Code features (B, N, D) to pixels (B, C, H, W), which are read at mask tokens."""

    def __init__(self, backbone: ViTBackbone, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.level_embedding = nn.Embedding(2, dim)
        self.backbone = backbone
        self.to_pixels = nn.Linear(dim, out_channels * patch_size**2)
        nn.init.trunc_normal_(self.level_embedding.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        h, w = self.backbone.grid
        masks = self.backbone.place(self.mask_token.expand(len(codes), h * w, -1))
        levels = self.level_embedding.weight
        # Unlike in the encoder, both parts keep a class token.
        x = self.backbone(torch.cat([masks + levels[0], self.backbone.place(codes) + levels[1]], 1))
        patches = self.to_pixels(x[:, 1 : 1 + h * w])
        p = self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)
