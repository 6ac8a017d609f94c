"""Discriminators: StyleGAN2's residual network (one logit per image) and PatchGAN (one logit per patch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.nn.batch_norm import BatchNorm2d
from vistok.nn.containers import ModuleList


class Discriminator(nn.Module):
    """Base of discriminators: images (B, C, H, W) or clips (B, C, T, H, W) to logits (B, ...) of any further shape.

    Attributes:
        in_channels: C.
        num_uniforms: how many random numbers ``forward`` needs per batch, as ``uniforms``, in [0, 1) on the host. If it
            is 0, ``forward`` has no such argument.
    """

    num_uniforms: ClassVar[int] = 0

    in_channels: int

    @classmethod
    def arguments_for(cls, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """The constructor's arguments that follow from the shape of the data, (C, H, W) or (C, T, H, W)."""
        return {"in_channels": input_shape[0]}

    @classmethod
    def arguments_for_range(cls, value_range: tuple[float, float]) -> dict[str, Any]:
        """The constructor's arguments that follow from the range of pixel values; most discriminators have none."""
        return {}

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that it uses, by name; they are not part of its state dict."""
        return {}

    def check_images(self, images: Tensor, least_side: int = 1, hint: str = "") -> None:
        """Raise ValueError unless these are images (B, in_channels, H, W) with sides of at least ``least_side``."""
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < least_side:
            sides = f" with sides of at least {least_side} px" if least_side > 1 else ""
            raise ValueError(
                f"images must be (batch, {self.in_channels}, H, W){sides}, got {tuple(images.shape)}{hint}"
            )


class StyleGANDiscriminator(Discriminator):
    """StyleGAN2's discriminator (Karras et al. 2020), as in ViT-VQGAN.

    A 1x1 stem, residual blocks that halve the side down to 4, the minibatch standard deviation as one more
    channel, a 3x3 convolution and two linear layers. Weights are stored at unit variance and scaled by
    1 / sqrt(fan-in) in every forward (equalised learning rate).

    Args:
        image_size: side of the square images, a power of two, at least 4.
        in_channels: of the images.
        channel_multiplier: scales the width of the stages above 32 px.

    Raises:
        ValueError: ``image_size`` is not a power of two, or below 4.
    """

    def __init__(self, image_size: int, in_channels: int = 3, channel_multiplier: int = 2):
        super().__init__()
        if image_size < 4 or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two, 4 or more, got {image_size}")
        self.image_size, self.in_channels = image_size, in_channels
        sides = [image_size >> level for level in range(image_size.bit_length() - 2)]  # image_size, ..., 8, 4
        widths = [_stylegan_width(side, channel_multiplier) for side in sides]
        self.blocks = ModuleList([_conv_layer(in_channels, widths[0], kernel_size=1)])
        self.blocks.extend(_ResidualBlock(wide, narrow) for wide, narrow in pairwise(widths))
        self.final_conv = _conv_layer(widths[-1] + 1, widths[-1], kernel_size=3)
        self.final_linear = ModuleList([_EqualLinear(widths[-1] * 4 * 4, widths[-1]), _EqualLinear(widths[-1], 1)])

    @classmethod
    def arguments_for(cls, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"in_channels": input_shape[0], "image_size": input_shape[-1]}

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build from the arguments (``size``, ``channel_multiplier``) and state dict of enhancing-transformers.

        Raises:
            CheckpointError: the keys or shapes do not fit.
        """
        from vistok.checkpoints import load_strictly

        model = cls(config.get("size", 256), channel_multiplier=config.get("channel_multiplier", 2))
        load_strictly(model, state_dict)
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit per image, (B,), from images (B, in_channels, image_size, image_size).

        Raises:
            ValueError: images of another shape.
        """
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        features = images
        for block in self.blocks:
            features = block(features)
        features = self.final_conv(_append_batch_deviation(features))  # (B, C, 4, 4)
        hidden, head = self.final_linear
        return head(_scaled_leaky_relu(hidden(features.flatten(1)))).squeeze(1)


class PatchGAN(Discriminator):
    """pix2pix's patch discriminator (Isola et al. 2017), as in VQGAN, LlamaGen and GigaTok.

    ``num_layers`` strided convolutions and two unstrided ones. With three layers and 4x4 kernels, the receptive field
    of a logit is 70 x 70 pixels. Convolutions are initialised by normal(0, 0.02). Parameters are named as in
    taming-transformers.

    Args:
        in_channels: of the images.
        width: channels of the first layer; doubled per layer, at most 8 times as many.
        num_layers: number of strided convolutions, each halving the side.
        norm: "batch" (with statistics of all processes), "group" (32 groups, or fewer if 32 does not divide the
            channels) or "none".
        kernel_size: side of the convolutions, 3 or 4, padded by 1.

    Raises:
        ValueError: unknown ``norm``, ``num_layers`` below 1, or another ``kernel_size``.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 64, num_layers: int = 3, norm: str = "batch", kernel_size: int = 4
    ):
        super().__init__()
        if kernel_size not in (3, 4):
            raise ValueError(f"kernel_size must be 3 or 4, got {kernel_size}")
        if norm not in _NORMS:
            raise ValueError(f"norm is {norm!r}; allowed: {', '.join(map(repr, _NORMS))}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.in_channels = in_channels
        self.min_size = 3 * 2**num_layers  # the two unstrided convolutions take a side of 3 to 1
        modules: list[nn.Module] = [nn.Conv2d(in_channels, width, kernel_size, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for level in range(1, num_layers + 1):
            out_channels = width * min(2**level, 8)
            stride = 2 if level < num_layers else 1
            # A norm has a bias of its own.
            conv = nn.Conv2d(channels, out_channels, kernel_size, stride=stride, padding=1, bias=norm == "none")
            modules += [conv, _NORMS[norm](out_channels), nn.LeakyReLU(0.2)]
            channels = out_channels
        modules.append(nn.Conv2d(channels, 1, kernel_size, stride=1, padding=1))
        self.main = nn.Sequential(*modules)
        self.apply(_init_patchgan)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), h about H / 2^num_layers - 2, from images (B, in_channels, H, W).

        Raises:
            ValueError: another number of channels, or images too small for one logit.
        """
        self.check_images(images, self.min_size, "; use fewer layers for smaller images")
        return self.main(images)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "none": lambda channels: nn.Identity(),
}


def _init_patchgan(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _stylegan_width(side: int, multiplier: int) -> int:
    return 512 if side <= 32 else 16384 * multiplier // side


def _scaled_leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)  # sqrt(2) keeps the variance


class _EqualConv2d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class _EqualLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class _Activation(nn.Module):
    """Per-channel bias, then the scaled leaky ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _scaled_leaky_relu(x + self.bias[:, None, None])


def binomial_kernel(size: int) -> Tensor:
    """The low-pass filter (size, size) of binomial coefficients, which sums to 1: [1, 3, 3, 1] / 8 in both directions
    for size 4 (arXiv 1904.11486)."""
    taps = torch.tensor([float(math.comb(size - 1, i)) for i in range(size)])
    return torch.outer(taps, taps) / taps.sum() ** 2


def low_pass(x: Tensor, kernel: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Filter every channel of (B, C, H, W) by a kernel (k, k)."""
    channels = x.shape[1]
    weight = kernel.to(x.dtype).expand(channels, 1, *kernel.shape[-2:])
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=channels)


class _Blur(nn.Module):
    """The low-pass filter [1, 3, 3, 1] before a strided convolution with ``kernel_size``."""

    kernel: Tensor

    def __init__(self, kernel_size: int, *, stride: int = 1):
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(4))
        padding = 2 + (kernel_size - 1)  # even for kernels of odd size
        self.padding, self.stride = padding // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return low_pass(x, self.kernel, stride=self.stride, padding=self.padding)


class _ResidualBlock(nn.Module):
    """(3x3 conv, blur, strided 3x3 conv) + (blur, strided 1x1 conv), divided by sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = _conv_layer(in_channels, in_channels, kernel_size=3)
        self.conv2 = nn.Sequential(
            _Blur(3), _EqualConv2d(in_channels, out_channels, 3, stride=2), _Activation(out_channels)
        )
        # A strided 1x1 convolution would read every second pixel only, so the blur has the stride.
        self.skip = nn.Sequential(_Blur(1, stride=2), _EqualConv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


def _conv_layer(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = _EqualConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(conv, _Activation(out_channels))


def _append_batch_deviation(x: Tensor) -> Tensor:
    """Append a channel with the standard deviation over groups of about 4 samples, averaged over (C, H, W)."""
    batch = x.shape[0]
    groups = max(batch // 4, 1)
    while batch % groups:  # a batch that is not a multiple of 4 gets fewer, larger groups
        groups -= 1
    grouped = x.unflatten(0, (batch // groups, groups))  # (members, groups, C, H, W)
    deviation = (grouped.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (groups,)
    channel = deviation.repeat(batch // groups).view(batch, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], dim=1)
