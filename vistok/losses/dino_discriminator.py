"""A discriminator on the features of a frozen DINO transformer.

StyleGAN-T (Sauer et al., arXiv 2301.09515, section 3.2) has small heads on features of several depths; VAR, GigaTok
(arXiv 2504.08736) and RobusTok (arXiv 2509.12474) train tokenizers with it. DINO: Caron et al., arXiv 2104.14294.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from vistok.losses.alignment import EncoderConfig, load_encoder
from vistok.losses.discriminators import Discriminator
from vistok.nn.containers import ModuleList
from vistok.nn.frozen import Frozen

IMAGE_SIZE = 224


class DINODiscriminator(Discriminator):
    """Heads on the frozen features of images: one logit per patch and depth.

    Features are the sum of patch tokens and class token, after the embedding and after the blocks ``taps``. The bias of
    the keys is 0, and GELU is the tanh approximation. Images whose sides are all above 224 px are cropped to 224 px
    with probability ``crop_probability``; else images are resized to it.

    The transformer is not part of the state dict: it is read from its weights file again. It moves to the device of the
    heads.

    Args:
        weights: a local weights file of the transformer that timm can read; None downloads the published one.
        in_channels: of the images, 3 or 1.
        transformer: name of a vision transformer in timm.
        taps: blocks, counted from 0, after which features are read.
        kernel_size: of the heads' convolution over patches, with circular padding; odd.
        norm_group: number of images over which the heads' batch norms average; all if it does not divide the batch.
        crop_probability: see above.
        value_range: the values of black and white pixels, which are mapped to [0, 1] and then normalised.

    Raises:
        ValueError: timm has no such transformer, it has no such block, or another argument is out of range.
        CheckpointError: the weights file is absent, damaged or of another model, or the download failed.
    """

    mean: Tensor
    std: Tensor

    num_uniforms = 3

    def __init__(
        self,
        weights: str | None = None,
        in_channels: int = 3,
        transformer: str = "vit_small_patch16_224.dino",
        taps: tuple[int, ...] = (2, 5, 8, 11),
        kernel_size: int = 9,
        norm_group: int = 8,
        crop_probability: float = 0.5,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ):
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"DINO sees images of 3 channels, or 1 repeated; got in_channels {in_channels}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that patches keep their number; got {kernel_size}")
        config = EncoderConfig(transformer, weights, IMAGE_SIZE)
        backbone = load_encoder(config, "losses.gan.discriminator.weights", act_layer="gelu_tanh")
        self._backbone = Frozen(_without_key_bias(backbone))
        depth = len(self.backbone.blocks)
        if not all(0 <= tap < depth for tap in taps):
            raise ValueError(f"taps must be blocks 0..{depth - 1} of {transformer}, got {list(taps)}")
        self.taps, self.crop_probability, self.in_channels = tuple(taps), crop_probability, in_channels
        self.value_range = tuple(value_range)
        statistics = (self.backbone.pretrained_cfg[key] for key in ("mean", "std"))
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        dim = self.backbone.num_features
        self.heads = ModuleList(_head(dim, kernel_size, norm_group) for _ in range(1 + len(taps)))

    @classmethod
    def arguments_for_range(cls, value_range: tuple[float, float]) -> dict[str, Any]:
        return {"value_range": value_range}

    @property
    def backbone(self) -> Any:
        """The transformer."""
        return self._backbone.network

    def frozen(self) -> dict[str, nn.Module]:
        return {"discriminator_transformer": self.backbone}

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> DINODiscriminator:
        self.backbone._apply(function, recurse)
        return super()._apply(function, recurse)

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Return logits (B, heads * patches) of images (B, in_channels, H, W) in ``value_range``.

        Args:
            uniforms: (3,) numbers in [0, 1) on the host: for the choice to crop, and for the top and left edge of the
                crop. None always resizes.

        Raises:
            ValueError: images of another shape.
        """
        self.check_images(images)
        features = self.features(self._sized(images, uniforms))
        return torch.cat([head(feature).flatten(1) for head, feature in zip(self.heads, features)], 1)

    def _sized(self, images: Tensor, uniforms: Tensor | None) -> Tensor:
        height, width = images.shape[2:]
        if uniforms is not None and min(height, width) > IMAGE_SIZE:
            crop, *place = uniforms.tolist()
            if crop < self.crop_probability:
                top, left = (int(u * (side - IMAGE_SIZE + 1)) for u, side in zip(place, (height, width)))
                return images[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        if (height, width) == (IMAGE_SIZE, IMAGE_SIZE):
            return images
        return F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="area")

    def features(self, images: Tensor) -> list[Tensor]:
        """The features (B, D, patches) of images (B, 1 or 3, 224, 224) in ``value_range``, the embedding's first."""
        model, (low, high) = self.backbone, self.value_range
        x = model.patch_embed(((images - low) / (high - low) - self.mean) / self.std)
        x = model.norm_pre(model._pos_embed(x))
        features = [self._readout(x)]
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number in self.taps:
                features.append(self._readout(x))
        return features

    def _readout(self, x: Tensor) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        return (x[:, prefix:] + x[:, :1]).mT  # (B, D, patches)


def _without_key_bias(transformer: Any) -> nn.Module:
    for block in transformer.blocks:
        with torch.no_grad():
            _, key_bias, _ = block.attn.qkv.bias.chunk(3)
            key_bias.zero_()
    return transformer


class GroupBatchNorm(nn.Module):
    """Batch norm of (B, C, L) with the statistics of ``group`` consecutive samples, also in evaluation.

    A batch that is not a multiple of the group is normalised as a whole.
    """

    def __init__(self, channels: int, group: int, eps: float = 1e-6):
        super().__init__()
        self.group, self.eps = group, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        size = self.group if x.shape[0] % self.group == 0 else x.shape[0]
        groups = x.float().unflatten(0, (-1, size))  # (groups, size, C, L)
        variance, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
        normed = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(0, 1)
        return (normed * self.weight[:, None] + self.bias[:, None]).type_as(x)


class _Residual(nn.Module):
    """(f(x) + x) / sqrt(2), which keeps unit variance."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + x) / math.sqrt(2)


def _head(dim: int, kernel_size: int, norm_group: int) -> nn.Sequential:
    """Features (B, D, L) to logits (B, 1, L)."""
    return nn.Sequential(
        _conv_block(dim, 1, norm_group),
        _Residual(_conv_block(dim, kernel_size, norm_group)),
        spectral_norm(nn.Conv1d(dim, 1, 1)),
    )


def _conv_block(dim: int, kernel_size: int, norm_group: int) -> nn.Sequential:
    conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv), GroupBatchNorm(dim, norm_group), nn.LeakyReLU(0.2))
