"""Differentiable augmentation of a discriminator's images, so that it does not overfit to few images.

DiffAugment: Zhao et al., arXiv 2006.10738; with the blur that StyleGAN-T (arXiv 2301.09515) fades out in training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_UNIFORMS = 7
GROUPS = ("translation", "color", "cutout")


class DiffAugment(nn.Module):
    """Shift images by up to a share of their sides, change their colours, and set a rectangle to 0.

    Args:
        groups: the transforms that are on, of "translation", "color" and "cutout".
        translation: largest shift, as a share of a side; uncovered pixels are 0.
        cutout: sides of the rectangle, as a share of those of the image.

    Raises:
        ValueError: an unknown group, or a share outside [0, 1].
    """

    def __init__(self, groups: tuple[str, ...] = GROUPS, translation: float = 0.125, cutout: float = 0.2):
        super().__init__()
        if unknown := set(groups) - set(GROUPS):
            raise ValueError(f"unknown augmentation {sorted(unknown)}; there are {', '.join(GROUPS)}")
        for name, share in (("translation", translation), ("cutout", cutout)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], a share of the image's sides, got {share}")
        self.groups, self.translation, self.cutout = tuple(groups), translation, cutout

    def forward(self, images: Tensor, uniforms: Tensor, *, blur: float = 0.0) -> Tensor:
        """Augment images (B, C, H, W), each by its own random numbers.

        Args:
            uniforms: (7, B) in [0, 1): for the vertical and horizontal shift, brightness, saturation, contrast, and the
                row and column of the rectangle.
            blur: strength, 0 (off) to 1, of a Gaussian blur that comes first; its kernel is exp2(-(x / s)^2) with
                s = blur * sqrt(H / 2).

        Raises:
            ValueError: ``uniforms`` have another shape.
        """
        if uniforms.shape[0] != NUM_UNIFORMS or uniforms.numel() != NUM_UNIFORMS * len(images):
            raise ValueError(
                f"uniforms must be ({NUM_UNIFORMS}, {len(images)}) for {len(images)} images, got "
                f"{tuple(uniforms.shape)}"
            )
        shift_y, shift_x, brightness, saturation, contrast, cut_y, cut_x = uniforms.reshape(NUM_UNIFORMS, -1)
        if blur > 0:
            images = _blurred(images, blur)
        if "translation" in self.groups:
            images = _translated(images, shift_y, shift_x, self.translation)
        if "color" in self.groups:
            images = _recoloured(images, brightness, saturation, contrast)
        if "cutout" in self.groups:
            images = _cut_out(images, cut_y, cut_x, self.cutout)
        return images


def _blurred(images: Tensor, strength: float) -> Tensor:
    channels, sigma = images.shape[1], strength * math.sqrt(images.shape[2] / 2)
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = (-((offsets / sigma) ** 2)).exp2()
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    images = F.pad(images, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(images, kernel, groups=channels), kernel.mT, groups=channels)


def _translated(images: Tensor, uniform_y: Tensor, uniform_x: Tensor, share: float) -> Tensor:
    rows, columns = (
        _shifted_indices(size, uniform, round(size * share))
        for size, uniform in zip(images.shape[2:], (uniform_y, uniform_x))
    )
    reach_y, reach_x = (round(size * share) for size in images.shape[2:])
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y)).permute(0, 2, 3, 1)
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shifted_indices(size: int, uniform: Tensor, reach: int) -> Tensor:
    """The indices (B, size), into an axis that is padded by ``reach``, for shifts of -reach, ..., reach."""
    return (uniform * (2 * reach + 1)).floor().long()[:, None] + torch.arange(size, device=uniform.device)


def _recoloured(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    brightness, saturation, contrast = (u.view(-1, 1, 1, 1) for u in (brightness, saturation, contrast))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey, images, 2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, contrast + 0.5)


def _cut_out(images: Tensor, uniform_y: Tensor, uniform_x: Tensor, share: float) -> Tensor:
    rows, columns = (
        _inside(size, uniform, int(size * share + 0.5))
        for size, uniform in zip(images.shape[2:], (uniform_y, uniform_x))
    )
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _inside(size: int, uniform: Tensor, length: int) -> Tensor:
    """(B, size) bool, True in an interval of ``length`` around a uniformly drawn centre, clipped at the ends."""
    centre = (uniform * (size + 1 - length % 2)).floor().long()[:, None]
    offset = torch.arange(size, device=uniform.device) - (centre - length // 2)
    return (offset >= 0) & (offset < length)
