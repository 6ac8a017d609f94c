"""MaskGIT's VQGAN: a convolutional autoencoder without attention, with 1024 codes on a 16x16 raster.

Paper: MaskGIT: Masked Generative Image Transformer (arXiv 2202.04200). Official weights and conventions: the port of
github.com/bytedance/1d-tokenizer (Apache-2.0). TiTok (arXiv 2406.07550) is trained against its codes, and RAR (arXiv
2411.00776) generates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.nn.conv import Upsample, group_norm
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.tokenizers.convolutional import ConvTokenizer

F16 = (1, 1, 2, 2, 4)


class CodecResBlock(nn.Module):
    """Two normalised 3x3 convolutions without biases: (B, C_in, h, w) -> (B, C_out, h, w).

    Where the channels change, the shortcut is a 1x1 convolution of the block's output, not of its input: the released
    weights were trained like this.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(y))


class CodecLevel(nn.Module):
    """The residual blocks at one resolution, then ``resample``."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, resample: nn.Module, norm_groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks - 1)
        self.blocks = nn.Sequential(*(CodecResBlock(width, out_channels, norm_groups) for width in widths))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


class CodecEncoder(nn.Module):
    """Pixels (B, C, H, W) to a map (B, z_channels, H / s, W / s) with s = 2 ** (levels - 1).

    Args:
        in_channels, z_channels: channels of the pixels and of the map.
        channels: base width.
        channel_mult: the width of each level, finest first, in units of ``channels``.
        res_blocks: residual blocks per level, and in the middle.
        norm_groups: groups of all group norms; must divide every width.
    """

    def __init__(
        self,
        in_channels: int,
        z_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        res_blocks: int,
        norm_groups: int,
    ):
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        deepest = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.levels = nn.Sequential(
            *(
                CodecLevel(
                    widths[i - 1] if i else channels,
                    width,
                    res_blocks,
                    nn.Identity() if i == deepest else nn.AvgPool2d(2),
                    norm_groups,
                )
                for i, width in enumerate(widths)
            )
        )
        self.middle = nn.Sequential(*(CodecResBlock(widths[-1], widths[-1], norm_groups) for _ in range(res_blocks)))
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.middle(self.levels(self.conv_in(pixels)))
        return self.conv_out(F.silu(self.norm_out(x)))


class CodecDecoder(nn.Module):
    """A map (B, z_channels, h, w) to pixels (B, out_channels, s * h, s * w); ``levels[0]`` is the deepest."""

    def __init__(
        self,
        out_channels: int,
        z_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        res_blocks: int,
        norm_groups: int,
    ):
        super().__init__()
        widths = [channels * mult for mult in reversed(channel_mult)]
        finest = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.middle = nn.Sequential(*(CodecResBlock(widths[0], widths[0], norm_groups) for _ in range(res_blocks)))
        self.levels = nn.Sequential(
            *(
                CodecLevel(
                    widths[max(i - 1, 0)],
                    width,
                    res_blocks,
                    nn.Identity() if i == finest else Upsample(width),
                    norm_groups,
                )
                for i, width in enumerate(widths)
            )
        )
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def begin(self, latents: Tensor) -> Tensor:
        """Latents (B, z_channels, h, w) to features (B, widest, h, w) at the same resolution."""
        return self.middle(self.conv_in(latents))

    def finish(self, x: Tensor, latents: Tensor) -> Tensor:
        """Features of ``begin`` to pixels; ``latents`` is unused, see ``ConvDecoder``."""
        return self.conv_out(F.silu(self.norm_out(self.levels(x))))

    def forward(self, latents: Tensor) -> Tensor:
        return self.finish(self.begin(latents), latents)


class MaskGITVQGAN(ConvTokenizer):
    """A raster of ids; any image whose sides are multiples of the stride 2 ** (levels - 1) encodes.

    Works in [0, 1] inside; public pixels are in [-1, 1].

    Args:
        image_size: side of the images that ``spec`` describes, or (height, width).
        in_channels: 3, or 1 for grey images.
        channels: base width of encoder and decoder.
        channel_mult: width of each level, finest first, in units of ``channels``.
        res_blocks: residual blocks per level, and in the middle.
        codebook_size: number of codes.
        codebook_embed_dim: channels of a code, and of the maps between encoder and decoder.
        codebook_restart_after: training steps after which an unused code is moved onto a latent; 0 turns this off.
        norm_groups: groups of all group norms (32 in the released model); they must divide every width.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: sides that are not multiples of the stride, or widths that norm_groups does not divide.
    """

    registry_name = "maskgit_vqgan"
    tiny = {
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "norm_groups": 4,
    }
    native_range = (0.0, 1.0)
    sizes = {"f16": {}}
    checkpoints = (OfficialCheckpoint("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", {}),)

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: tuple[int, ...] = F16,
        res_blocks: int = 2,
        codebook_size: int = 1024,
        codebook_embed_dim: int = 256,
        codebook_restart_after: int = 0,
        norm_groups: int = 32,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__(image_size, in_channels, len(channel_mult))
        sizes = (in_channels, codebook_embed_dim, channels, channel_mult, res_blocks, norm_groups)
        encoder, decoder = CodecEncoder(*sizes), CodecDecoder(*sizes)
        own = chosen_quantizer(
            quantizer,
            codebook_embed_dim,
            lambda: VectorQuantizer(
                codebook_size,
                codebook_embed_dim,
                normalize=False,
                init="uniform",
                restart_after=codebook_restart_after,
            ),
        )
        self.build(encoder, nn.Identity(), own, nn.Identity(), decoder)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, WITHOUT_EFFECT)
        channel_mult = tuple(given.take("channel_mult", F16))
        given.require("num_resolutions", len(channel_mult), why="it is the number of entries of channel_mult")
        given.require("dropout", 0.0, why="the released model has none")
        z_channels = given.take("z_channels", 256)
        given.require("embedding_dim", z_channels, why="codes are the maps of z_channels themselves")
        model = cls(
            image_size=given.take("resolution", 256),
            in_channels=given.take("num_channels", 3),
            channels=given.take("hidden_channels", 128),
            channel_mult=channel_mult,
            res_blocks=given.take("num_res_blocks", 2),
            codebook_size=given.take("num_embeddings", 1024),
            codebook_embed_dim=z_channels,
        )
        given.finish()
        return model.with_official_weights(official_names(state_dict, len(channel_mult)))


WITHOUT_EFFECT = {"commitment_cost": "a weight of the loss, which the run's config names"}


def official_names(state: Mapping[str, Tensor], levels: int, decoder: str = "decoder") -> dict[str, Tensor]:
    """The codec's weights under our names; ``decoder`` is the prefix of its decoder in the file."""
    rules = [
        (r"encoder\.down\.(\d+)\.block\.(\d+)\.nin_shortcut\.(\w+)", r"encoder.levels.\1.blocks.\2.shortcut.\3"),
        (r"encoder\.down\.(\d+)\.block\.(\d+)\.(\w+\.\w+)", r"encoder.levels.\1.blocks.\2.\3"),
        (r"encoder\.mid\.(\d+)\.(\w+\.\w+)", r"encoder.middle.\1.\2"),
        (rf"{decoder}\.mid\.(\d+)\.(\w+\.\w+)", rf"{decoder}.middle.\1.\2"),
        (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
    ]
    for level in range(levels):  # the reference counts the decoder's levels from the finest
        ours = rf"{decoder}.levels.{levels - 1 - level}"
        rules += [
            (rf"{decoder}\.up\.{level}\.block\.(\d+)\.nin_shortcut\.(\w+)", rf"{ours}.blocks.\1.shortcut.\2"),
            (rf"{decoder}\.up\.{level}\.block\.(\d+)\.(\w+\.\w+)", rf"{ours}.blocks.\1.\2"),
            (rf"{decoder}\.up\.{level}\.upsample_conv\.(\w+)", rf"{ours}.resample.conv.\1"),
        ]
    return rename(state, rules)
