"""The convolutional autoencoder of VQGAN (Esser et al., arXiv 2012.09841), as LlamaGen and latent diffusion use it.

Group norm, SiLU, residual blocks of two 3x3 convolutions, single-head attention over all pixels where the map is
smallest; every level but the deepest halves the sides. MAGVIT-v2 (arXiv 2310.05737), and after it GigaTok (arXiv
2504.08736), leave attention out, upsample by depth to space, and begin every level of the decoder with a norm whose
scale and shift are computed from the decoder's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.causal_conv import CausalConv3d
from vistok.nn.containers import ModuleList
from vistok.nn.norms import AdaptiveGroupNorm

UpsampleKind = Literal["nearest", "depth_to_space"]
Padding = Literal["after", "around"]
ConvKind = type[nn.Conv2d] | type[CausalConv3d]
"""The convolutions of an autoencoder of images, or of clips."""
Resample = Callable[[int, int], nn.Module]
"""Builds the module that ends a level, from the number of the level (0 is the finest) and its width."""


def check_groups(channels: int, groups: int) -> None:
    """Raise ValueError unless the groups of a group norm divide the channels."""
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be split into {groups} groups for group norm; take channels that are "
            "multiples of norm_groups, or a smaller norm_groups"
        )


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group norm with VQGAN's eps.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    check_groups(channels, groups)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block of two pre-norm 3x3 convolutions: (B, C_in, h, w) -> (B, C_out, h, w).

    ``bias`` and ``conv``, the class, apply to all convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_groups: int = 32,
        dropout: float = 0.0,
        bias: bool = True,
        conv: ConvKind = nn.Conv2d,
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=bias)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.shortcut(x) + y


class AttnBlock(nn.Module):
    """Single-head attention over all pixels, with a residual: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, *, norm_groups: int = 32):
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(project(y), "b c h w -> b 1 (h w) c") for project in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h * w, C)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve the sides with a strided convolution: (B, C, h, w) -> (B, C, h / 2, w / 2).

    ``padding`` says where zeros are added: "after" only at the right and the bottom, as in VQGAN, "around" on all
    sides, as in MAGVIT-v2. They differ by a shift of the grid.
    """

    def __init__(self, channels: int, padding: Padding = "after"):
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(f"padding must be 'after' or 'around', got {padding!r}")
        self.pads = (0, 1, 0, 1) if padding == "after" else (1, 1, 1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pads))


class Upsample(nn.Module):
    """Double the sides by repetition, then convolve: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DepthToSpace(nn.Module):
    """Convolve, then double the sides by moving channels into space: (B, C, h, w) -> (B, C, 2h, 2w).

    Of the 4 C channels of the convolution, number (2 i + j) C + c goes to row i and column j of the 2x2 pixels of
    channel c (the DCR order of ONNX; ``pixel_shuffle`` has another).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "b (i j c) h w -> b c (h i) (w j)", i=2, j=2)


UPSAMPLES = {"nearest": Upsample, "depth_to_space": DepthToSpace}


class Level(nn.Module):
    """The residual blocks at one resolution, each followed by attention if ``attend``, then ``resample``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        resample: nn.Module,
        *,
        attend: bool,
        norm_groups: int,
        dropout: float,
        bias: bool,
        conv: ConvKind,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks - 1)
        self.blocks = ModuleList(
            ResBlock(width, out_channels, norm_groups=norm_groups, dropout=dropout, bias=bias, conv=conv)
            for width in widths
        )
        self.attentions = ModuleList(
            AttnBlock(out_channels, norm_groups=norm_groups) if attend else nn.Identity() for _ in widths
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions):
            x = attention(block(x))
        return self.resample(x)


def _middle(
    channels: int, blocks: int, *, attend: bool, norm_groups: int, dropout: float, bias: bool, conv: ConvKind
) -> nn.Sequential:
    modules: list[nn.Module] = [
        ResBlock(channels, channels, norm_groups=norm_groups, dropout=dropout, bias=bias, conv=conv)
        for _ in range(blocks)
    ]
    if attend:
        modules.insert(1, AttnBlock(channels, norm_groups=norm_groups))
    return nn.Sequential(*modules)


def _attending(levels: Sequence[int] | None, attend: bool, count: int) -> set[int]:
    """The numbers of the levels with attention, 0 the finest, of ``count``.

    Raises:
        ValueError: there is no such level.
    """
    if levels is None:
        return {count - 1} if attend else set()
    if not all(0 <= level < count for level in levels):
        raise ValueError(f"attention_levels {tuple(levels)} must be among the levels 0 (the finest) to {count - 1}")
    return set(levels)


class ConvEncoder(nn.Module):
    """Pixels (B, C, H, W) to a map (B, out_channels, H / s, W / s) with s = 2 ** (levels - 1).

    Args:
        in_channels, out_channels: channels of the pixels and of the map.
        channels: base width.
        channel_mult: the width of each level, finest first, in units of ``channels``.
        res_blocks: residual blocks per level.
        norm_groups: groups of all group norms; must divide every width.
        dropout: inside the residual blocks, in training.
        attend: attention over all pixels, in the deepest level and in the middle.
        attention_levels: levels (0 is the finest) with attention, in place of the deepest.
        middle_blocks: residual blocks in the middle; attention, if any, follows the first.
        bias: whether the first convolution and those of the residual blocks have biases.
        padding: of the strided convolutions, see ``Downsample``.
        out_kernel: side of the last convolution, 1 or 3.
        conv: class of all convolutions.
        resample: builds the module that ends every level but the deepest; None is ``Downsample``.

    Raises:
        ValueError: attention in a level that does not exist, widths that norm_groups does not divide, or an unknown
            ``padding``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        res_blocks: int,
        *,
        norm_groups: int = 32,
        dropout: float = 0.0,
        attend: bool = True,
        attention_levels: Sequence[int] | None = None,
        middle_blocks: int = 2,
        bias: bool = True,
        padding: Padding = "after",
        out_kernel: int = 3,
        conv: ConvKind = nn.Conv2d,
        resample: Resample | None = None,
    ):
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        deepest = len(widths) - 1
        attending = _attending(attention_levels, attend, len(widths))
        options: dict[str, Any] = {"norm_groups": norm_groups, "dropout": dropout, "bias": bias, "conv": conv}
        resample = resample or (lambda _, width: Downsample(width, padding))
        self.conv_in = conv(in_channels, channels, 3, padding=1, bias=bias)
        self.levels = ModuleList(
            Level(
                widths[i - 1] if i else channels,
                width,
                res_blocks,
                nn.Identity() if i == deepest else resample(i, width),
                attend=i in attending,
                **options,
            )
            for i, width in enumerate(widths)
        )
        self.middle = _middle(widths[-1], middle_blocks, attend=attend, **options)
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = conv(widths[-1], out_channels, out_kernel, padding=out_kernel // 2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class ConvDecoder(nn.Module):
    """A map (B, in_channels, h, w) to pixels (B, out_channels, s * h, s * w); the mirror of ConvEncoder.

    ``channel_mult`` is given finest first too; ``levels[0]`` is the deepest.

    Args:
        in_channels, out_channels, channels, channel_mult, norm_groups, dropout, attend, attention_levels,
            middle_blocks: as in ConvEncoder.
        res_blocks: residual blocks per level of the encoder.
        extra_blocks: additional residual blocks per level of the decoder.
        bias: whether the residual blocks' convolutions have biases.
        upsample: "nearest" repeats pixels and convolves; "depth_to_space" convolves and moves channels into space.
        conv: as in ConvEncoder.
        resample: builds the module that ends every level but the finest, in place of ``upsample``.
        adaptive_norm: begin each level with a norm whose scale and shift are computed from the decoder's input
            (``AdaptiveGroupNorm``).

    Raises:
        ValueError: an unknown ``upsample``, or as in ConvEncoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        res_blocks: int,
        *,
        norm_groups: int = 32,
        dropout: float = 0.0,
        attend: bool = True,
        attention_levels: Sequence[int] | None = None,
        middle_blocks: int = 2,
        extra_blocks: int = 1,
        bias: bool = True,
        upsample: UpsampleKind = "nearest",
        adaptive_norm: bool = False,
        conv: ConvKind = nn.Conv2d,
        resample: Resample | None = None,
    ):
        super().__init__()
        if upsample not in UPSAMPLES:
            raise ValueError(f"upsample must be one of {', '.join(map(repr, UPSAMPLES))}, got {upsample!r}")
        widths = [channels * mult for mult in reversed(channel_mult)]
        inputs = [widths[0], *widths[:-1]]  # channels that enter each level
        finest = len(widths) - 1
        attending = _attending(attention_levels, attend, len(widths))
        options: dict[str, Any] = {"norm_groups": norm_groups, "dropout": dropout, "bias": bias, "conv": conv}
        resample = resample or (lambda _, width: UPSAMPLES[upsample](width))
        self.conv_in = conv(in_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], middle_blocks, attend=attend, **options)
        self.levels = ModuleList(
            Level(
                inputs[i],
                width,
                res_blocks + extra_blocks,
                nn.Identity() if i == finest else resample(finest - i, width),
                attend=finest - i in attending,
                **options,
            )
            for i, width in enumerate(widths)
        )
        self.styles = (
            ModuleList(AdaptiveGroupNorm(width, in_channels, norm_groups) for width in inputs)
            if adaptive_norm
            else None
        )
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = conv(widths[-1], out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        return self.finish(self.begin(latents), latents)

    def begin(self, latents: Tensor) -> Tensor:
        """Latents (B, in_channels, h, w) to features (B, widest, h, w) at the same resolution."""
        return self.middle(self.conv_in(latents))

    def finish(self, x: Tensor, latents: Tensor) -> Tensor:
        """Features of ``begin`` to pixels; adaptive norms read the ``latents``."""
        for i, level in enumerate(self.levels):
            x = level(x if self.styles is None else self.styles[i](x, latents))
        return self.conv_out(F.silu(self.norm_out(x)))
