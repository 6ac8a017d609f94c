"""A patch discriminator that applies a low-pass filter before each downsampling.

The discriminator of the pretrained tokenizers of Open-MAGVIT2 (arXiv 2409.04410), after StyleGAN's low-pass filters
(Karras et al., arXiv 1812.04948).
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.losses.discriminators import Discriminator, binomial_kernel, low_pass

NORM_GROUPS = 32


class BlurDiscriminator(Discriminator):
    """A 5x5 convolution, stages of a 3x3 convolution and a blur that halves the side, and two convolutions to a logit.

    Convolutions keep the side. Stage i, counted from 0, has ``width`` * 2^i channels.

    Args:
        in_channels: of the images.
        width: channels of the first layer, a multiple of 32.
        num_stages: number of stages, each of which halves the side.
        kernel_size: of the blur, whose weights are binomial coefficients: 4 is (1, 3, 3, 1).

    Raises:
        ValueError: no stages, a width that is not a multiple of 32, or a kernel of less than 2 pixels.
    """

    def __init__(self, in_channels: int = 3, width: int = 128, num_stages: int = 3, kernel_size: int = 4):
        super().__init__()
        if num_stages < 1 or width < 1 or width % NORM_GROUPS or kernel_size < 2:
            raise ValueError(
                f"a blur discriminator has at least 1 stage, a width that is a multiple of {NORM_GROUPS}, and a kernel "
                f"of at least 2 pixels; got num_stages {num_stages}, width {width}, kernel_size {kernel_size}"
            )
        self.in_channels, self.min_size = in_channels, 2**num_stages
        widths = [width, *(width * 2**i for i in range(num_stages))]
        self.block_in = nn.Sequential(nn.Conv2d(in_channels, width, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1),
                    Blur(kernel_size),
                    nn.GroupNorm(NORM_GROUPS, after),
                    nn.LeakyReLU(0.1),
                )
                for before, after in pairwise(widths)
            )
        )
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), h = H / 2^num_stages rounded up, from images (B, in_channels, H, W).

        Raises:
            ValueError: another number of channels, or images too small for one logit.
        """
        self.check_images(images, self.min_size, "; use fewer stages for smaller images")
        return self.to_logits(self.blocks(self.block_in(images)))


class Blur(nn.Module):
    """A binomial low-pass filter with stride 2, padded by zeros: (B, C, h, w) -> (B, C, h / 2, w / 2), rounded up."""

    kernel: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(size)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        size = self.kernel.shape[-1]
        pads: list[int] = []
        for side in reversed(x.shape[2:]):
            missing = max((-(-side // 2) - 1) * 2 + size - side, 0)
            pads += [missing // 2, missing - missing // 2]  # an odd pixel goes to the right or bottom
        return low_pass(F.pad(x, pads), self.kernel, stride=2)
