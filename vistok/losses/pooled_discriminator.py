"""TiTok's patch discriminator (arXiv 2406.07550): low-pass filters, and logits on a fixed raster."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.losses.discriminators import Discriminator, binomial_kernel, low_pass
from vistok.nn.containers import ModuleList

SLOPE = 0.1


class PooledDiscriminator(Discriminator):
    """A 5x5 convolution, stages that halve the side, adaptive max pooling to a raster, and two convolutions.

    A stage is a 3x3 convolution, the low-pass filter [1, 3, 3, 1] with stride 2, group norm and a leaky ReLU.

    Args:
        in_channels: of the images.
        width: channels of the first convolution and of the first stage; doubled per stage, at most 4 times as many.
        num_stages: number of stages, each of which halves the side.
        grid: side of the raster of logits.
        norm_groups: groups of the group norms; must divide the width.

    Raises:
        ValueError: a number below 1, or groups that do not divide the width.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 128, num_stages: int = 3, grid: int = 16, norm_groups: int = 32
    ):
        super().__init__()
        if min(in_channels, width, num_stages, grid, norm_groups) < 1:
            raise ValueError("in_channels, width, num_stages, grid and norm_groups must be at least 1")
        if width % norm_groups:
            raise ValueError(f"norm_groups {norm_groups} does not divide width {width}")
        self.in_channels = in_channels
        widths = [width, *(width * min(2**stage, 4) for stage in range(num_stages))]
        self.input = nn.Conv2d(in_channels, width, 5, padding=2)
        self.stages = ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, padding=1),
                BlurPool(),
                nn.GroupNorm(norm_groups, wide),
                nn.LeakyReLU(SLOPE),
            )
            for narrow, wide in pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(grid)
        self.output = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(SLOPE), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, grid, grid) of images (B, in_channels, H, W).

        Raises:
            ValueError: another number of channels.
        """
        self.check_images(images)
        x = F.leaky_relu(self.input(images), SLOPE)
        for stage in self.stages:
            x = stage(x)
        return self.output(self.pool(x))


class BlurPool(nn.Module):
    """The low-pass filter [1, 3, 3, 1] in both directions, with stride 2 (arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return low_pass(x, self.kernel, stride=2, padding=1)
