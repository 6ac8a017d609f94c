"""The networks of TiTok (arXiv 2406.07550): an encoder to a few latent tokens, and a decoder from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.nn.containers import ModuleList
from vistok.nn.vit import TransformerSize, ViTBlock
from vistok.tokenizers.maskgit_vqgan import F16, CodecDecoder

Grid = tuple[int, int]
NORM_EPS = 1e-5


SMALL = TransformerSize(512, 8, 8)
BASE = TransformerSize(768, 12, 12)
LARGE = TransformerSize(1024, 24, 16)


@dataclass(frozen=True)
class CodecConfig:
    """Codebook and pixel decoder of the MaskGIT-VQGAN whose codes TiTok's decoder predicts; fields as in
    ``MaskGITVQGAN``."""

    codebook_size: int = 1024
    codebook_embed_dim: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = F16
    res_blocks: int = 2
    norm_groups: int = 32

    @property
    def stride(self) -> int:
        """Side in pixels of the area of one code."""
        return 2 ** (len(self.channel_mult) - 1)

    def decoder(self, out_channels: int) -> CodecDecoder:
        """A new pixel decoder."""
        return CodecDecoder(
            out_channels,
            self.codebook_embed_dim,
            self.channels,
            self.channel_mult,
            self.res_blocks,
            self.norm_groups,
        )


class Transformer(nn.Module):
    """Norm, pre-norm blocks, norm: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TransformerSize):
        super().__init__()
        self.norm_pre = nn.LayerNorm(config.dim, NORM_EPS)
        self.blocks = ModuleList(ViTBlock(config.dim, config.num_heads, eps=NORM_EPS) for _ in range(config.num_layers))
        self.norm_post = nn.LayerNorm(config.dim, NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The last norm, for the positions (B, n, D) that are read."""
        return self.norm_post(x)


class Encoder(nn.Module):
    """Pixels (B, C, H, W) and latent tokens to latents (B, N, out_dim).

    Args:
        grid: (h, w) patches.
        num_tokens: latent tokens N.
        out_dim: channels of a latent.
        mixes_positions: before the projection, reinterpret the N x W outputs as W rows of N numbers, and transpose
            them. The two-stage models were trained like this.
    """

    def __init__(
        self,
        config: TransformerSize,
        grid: Grid,
        patch_size: int,
        in_channels: int,
        num_tokens: int,
        out_dim: int,
        mixes_positions: bool,
    ):
        super().__init__()
        self.mixes_positions = mixes_positions
        self.patch_embed = nn.Conv2d(in_channels, config.dim, patch_size, patch_size)
        self.class_token = learned(1, config.dim)
        self.positions = learned(1 + grid[0] * grid[1], config.dim)
        self.latent_positions = learned(num_tokens, config.dim)
        self.transformer = Transformer(config)
        self.output = nn.Linear(config.dim, out_dim)

    def forward(self, pixels: Tensor, latent_tokens: Tensor) -> Tensor:
        patches = rearrange(self.patch_embed(pixels), "b d h w -> b (h w) d")
        x = with_class(self.class_token, patches) + self.positions
        latents = (latent_tokens + self.latent_positions).expand(len(x), -1, -1)
        x = self.transformer(torch.cat([x, latents], 1))  # (B, 1 + P + N, W)
        x = self.transformer.finish(x[:, -latents.shape[1] :])
        if self.mixes_positions:
            x = x.reshape(len(x), x.shape[2], x.shape[1]).mT  # (B, N, W)
        return self.output(x)


class Decoder(nn.Module):
    """Latents (B, N, D) to features of the patches, (B, P, W)."""

    def __init__(self, config: TransformerSize, grid: Grid, num_tokens: int, in_dim: int):
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.input = nn.Linear(in_dim, config.dim)
        self.class_token = learned(1, config.dim)
        self.mask_token = learned(1, 1, config.dim)
        self.positions = learned(1 + self.num_patches, config.dim)
        self.latent_positions = learned(num_tokens, config.dim)
        self.transformer = Transformer(config)

    def forward(self, latents: Tensor, context: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Decode.

        Args:
            context: (B, T, W) further tokens after the latents, or None.
            seen: (B, T) bool, True where a context token may be attended to; None is all.
        """
        masks = self.mask_token.expand(len(latents), self.num_patches, -1)
        x = with_class(self.class_token, masks) + self.positions
        parts = [x, self.input(latents) + self.latent_positions]
        mask = None
        if context is not None:
            parts.append(context)
            if seen is not None:
                before = seen.new_ones(len(seen), x.shape[1] + latents.shape[1])
                mask = torch.cat([before, seen], 1)[:, None, None]  # (B, 1, 1, keys)
        x = self.transformer(torch.cat(parts, 1), mask)
        return self.transformer.finish(x[:, 1 : 1 + self.num_patches])


class PixelHead(nn.Module):
    """Features of patches (B, P, W) to pixels (B, C, H, W): a linear layer per patch, then a 3x3 convolution."""

    def __init__(self, dim: int, grid: Grid, patch_size: int, out_channels: int):
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.to_patches = nn.Linear(dim, out_channels * patch_size**2)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        patches = self.to_patches(features)
        image = rearrange(
            patches, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid[0], p=self.patch_size, q=self.patch_size
        )
        return self.conv_out(image)


class CodeHead(nn.Sequential):
    """Features (B, P, W) to logits (B, P, K) over the codes of the codec."""

    def __init__(self, dim: int, codebook_size: int):
        super().__init__(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, codebook_size))
        self.num_codes = codebook_size


class CodecRenderer(nn.Module):
    """Logits (B, P, K) over the codec's codes to pixels: decodes the expected code of each position."""

    def __init__(self, config: CodecConfig, grid: Grid, out_channels: int):
        super().__init__()
        self.grid = grid
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        self.decoder = config.decoder(out_channels)

    def forward(self, logits: Tensor) -> Tensor:
        codes = logits.softmax(-1) @ self.embedding.weight  # (B, P, D)
        return self.decoder(rearrange(codes, "b (h w) d -> b d h w", h=self.grid[0]))


def learned(*shape: int) -> nn.Parameter:
    """A learned token or table, whose rows start with a norm of about 1."""
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def with_class(class_token: Tensor, tokens: Tensor) -> Tensor:
    """Prepend the class token (1, D) to tokens (B, n, D)."""
    return torch.cat([class_token.to(tokens).expand(len(tokens), 1, -1), tokens], 1)
