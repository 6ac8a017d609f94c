"""From a decoded image to pixels: crops, flips, small affine changes.

Crops work on 8-bit PIL images, as in the published protocols; flips and affine changes work on whole batches. Random
transforms take their uniform numbers as an argument, so that a result depends on (seed, epoch, image) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.data.config import Affine
from vistok.draws import Keys

Crop = Literal["center", "random", "random_resized", "resize"]

EXTREME = 32
"""Of images whose long side is more than this many times the short one, a part is cut out before they are resized:
256 x 15,360,000 pixels, which an image of 1 x 60,000 becomes, would fill all memory."""


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size) (Dhariwal & Nichol 2021), the preprocessing of most ImageNet scores."""
    image = _shrink_adm(_cut_out(image), size)
    return _crop(image, size, left=(image.width - size) // 2, top=(image.height - size) // 2)


def random_resized_crop(image: Image.Image, size: int, uniforms: Sequence[float]) -> Image.Image:
    """ADM's random crop, as LlamaGen trains with it: short side drawn from size..size / 0.8, then a random position.

    ``uniforms`` are three numbers in [0, 1): for the short side, the left and the top edge.
    """
    zoom, *position = uniforms
    image = _shrink_adm(_cut_out(image, position), size + int(zoom * (math.ceil(size / 0.8) - size + 1)))
    return _crop_at(image, size, position)


def random_crop(image: Image.Image, size: int, uniforms: Sequence[float]) -> Image.Image:
    """ViT-VQGAN's training crop: the short side becomes ``size`` (bilinear), the position along the other is random.

    ``uniforms`` are two numbers in [0, 1): for the left and the top edge.
    """
    image = _cut_out(image, uniforms)
    (width, height), short = image.size, min(image.size)
    image = image.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    return _crop_at(image, size, uniforms)


def squash(image: Image.Image, size: int) -> Image.Image:
    """Resize both sides to ``size`` (bilinear), whatever the aspect ratio, as ViT-VQGAN does for validation."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def ten_crop(pixels: Tensor, size: int) -> Tensor:
    """The four corners and the centre, then the same five of the mirrored images.

    Args:
        pixels: (B, C, H, W) with H, W >= size.

    Returns:
        (B, 10, C, size, size): upper left, upper right, lower left, lower right and centre crops of the images, then
        those of the mirrored images.

    Raises:
        ValueError: the images are smaller than ``size``.
    """
    height, width = pixels.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"ten_crop cannot cut {size} x {size} out of images of {height} x {width} (H x W)")
    bottom, right = height - size, width - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    crops = [
        view[..., top : top + size, left : left + size] for view in (pixels, pixels.flip(-1)) for top, left in corners
    ]
    return torch.stack(crops, dim=1)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 images (B, H, W, C) to float32 pixels (B, C, H, W) in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def random_flip(pixels: Tensor, uniforms: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) whose uniform number (B,) is below one half."""
    return torch.where((uniforms < 0.5)[:, None, None, None], pixels.flip(-1), pixels)


def random_affine(pixels: Tensor, affine: Affine, uniforms: Tensor) -> Tensor:
    """Rotate, scale and shift each image about its centre (bilinear; pixels from outside the image are black).

    Args:
        pixels: (B, C, H, W) in [-1, 1].
        uniforms: (B, 4) in [0, 1): for angle, scale, horizontal and vertical shift; one half changes nothing.
    """
    height, width = pixels.shape[-2:]
    angle, scale, shift_x, shift_y = (2 * uniforms - 1)[..., None, None].unbind(1)  # (B, 1, 1) each
    angle = angle * math.radians(affine.degrees)
    scale = 1 + scale * affine.scale
    # Output coordinates in [-1, 1], one row and one column; each output pixel is sampled at its source.
    x = ((torch.arange(width) + 0.5) * 2 / width - 1)[None, None, :] - 2 * affine.translate * shift_x  # (B, 1, W)
    y = ((torch.arange(height) + 0.5) * 2 / height - 1)[None, :, None] - 2 * affine.translate * shift_y  # (B, H, 1)
    # Element by element, not by a matrix product, whose rounding may depend on the batch size.
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    source_x = cosine * x + sine * y * (height / width)
    source_y = cosine * y - sine * x * (width / height)
    grid = torch.stack((source_x, source_y), dim=-1)  # (B, H, W, 2)
    return F.grid_sample(pixels + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


@dataclass(frozen=True)
class ImageTransform:
    """Turns images into pixels: a crop to ``size``, then flips and affine changes; see ``DataConfig`` for each."""

    size: int
    crop: Crop = "center"
    flip: bool = False
    affine: Affine | None = None

    @property
    def crops_randomly(self) -> bool:
        return self.crop in ("random", "random_resized")

    def without_augmentation(self) -> ImageTransform:
        """The transform that evaluation uses: the centre crop for a random one, no flips, no affine changes."""
        crop = "center" if self.crops_randomly else self.crop
        return replace(self, crop=crop, flip=False, affine=None)

    def crop_image(self, image: Image.Image, uniforms: Sequence[float] | None = None) -> Image.Image:
        """Crop an image to (size, size).

        Args:
            uniforms: three numbers in [0, 1), which only random crops use.

        Raises:
            ValueError: a random crop without ``uniforms``.
        """
        if image.size == (self.size, self.size) and self.crop != "random_resized":
            return image
        if self.crops_randomly and uniforms is None:
            raise ValueError(f"the crop {self.crop!r} needs random numbers")
        uniforms = uniforms or ()
        if self.crop == "random_resized":
            return random_resized_crop(image, self.size, uniforms)
        if self.crop == "random":
            return random_crop(image, self.size, uniforms[1:])
        return center_crop_adm(image, self.size) if self.crop == "center" else squash(image, self.size)

    def crop_uniforms(self, keys: Keys) -> list[Sequence[float] | None]:
        """The ``uniforms`` of ``crop_image`` for each sample of ``keys``."""
        return keys.uniform("crop", 3).tolist() if self.crops_randomly else [None] * len(keys)

    def augment(self, pixels: Tensor, keys: Keys) -> Tensor:
        """Apply flips and affine changes to pixels (B, C, size, size), with random numbers drawn by ``keys``."""
        if self.flip:
            pixels = random_flip(pixels, keys.uniform("flip"))
        if self.affine is not None:
            pixels = random_affine(pixels, self.affine, keys.uniform("affine", 4))
        return pixels


def crop_source(size: tuple[int, int], position: Sequence[float] = (0.5, 0.5)) -> tuple[int, int, int, int]:
    """The part (left, top, right, bottom) of an image of ``size`` (W, H) that a square crop is taken from: all of it,
    but for extreme shapes (see ``EXTREME``).

    ``position`` are two numbers in [0, 1) for the left and the top edge, which then position the crop in that part.
    """
    kept = [min(side, EXTREME * min(size)) for side in size]
    left, top = (int(u * (side - length + 1)) for u, side, length in zip(position, size, kept, strict=True))
    return left, top, left + kept[0], top + kept[1]


def _cut_out(image: Image.Image, position: Sequence[float] = (0.5, 0.5)) -> Image.Image:
    box = crop_source(image.size, position)
    return image if box == (0, 0, *image.size) else image.crop(box)


def _shrink_adm(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to ``size``: halve with BOX while it is at least twice that, then resize with BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int, *, left: int, top: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _crop_at(image: Image.Image, size: int, position: Sequence[float]) -> Image.Image:
    left, top = (int(u * (side - size + 1)) for u, side in zip(position, image.size, strict=True))
    return _crop(image, size, left=left, top=top)
