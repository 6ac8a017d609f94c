"""Causal 3D convolutions of clips: MAGVIT-v2 (Yu et al., arXiv 2310.05737), section 3.2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """A convolution (B, C, T, H, W) -> (B, C', T', H', W') that is causal in time: no output depends on later frames.

    Time is padded with zeros before the first frame. ``padding`` applies to height and width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        padding: int = 0,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=(0, padding, padding), bias=bias
        )

    def forward(self, clips: Tensor) -> Tensor:
        return super().forward(F.pad(clips, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


class CausalDownsample(nn.Module):
    """Halve the sides with a strided convolution; with ``in_time``, an odd T becomes (T + 1) / 2."""

    def __init__(self, channels: int, *, in_time: bool):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, padding=1, stride=(2 if in_time else 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CausalDepthToSpace(nn.Module):
    """Convolve, then double the sides by moving channels into space; with ``in_time``, T becomes 2 T - 1.

    Channels are in the order (time, row, column, channel). The first frame yields two, of which the second is dropped:
    the first step in time stands for a single frame.
    """

    def __init__(self, channels: int, *, in_time: bool):
        super().__init__()
        self.frames = 2 if in_time else 1
        self.conv = CausalConv3d(channels, 4 * self.frames * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.conv(x), "b (s i j c) t h w -> b c (t s) (h i) (w j)", s=self.frames, i=2, j=2)
        return y if self.frames == 1 else torch.cat([y[:, :, :1], y[:, :, 2:]], 2)
