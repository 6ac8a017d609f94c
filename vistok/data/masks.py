"""Masks of image regions, in pixels and in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.data.pictures import from_pil


def pixel_masks(masks: Image.Image | Sequence[Image.Image] | Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Masks of ``count`` images as one bool tensor (count, height, width).

    Args:
        masks: PIL images, cropped to ``size`` like photos (ADM's centre crop), True where they are lighter than
            mid-grey; or a bool tensor, (height, width) or (count, height, width). A single mask is used for all images.
        size: (height, width).

    Raises:
        ValueError: another number of masks, another size, or a tensor that is not bool.
    """
    if not isinstance(masks, Tensor):
        pictures = [masks] if isinstance(masks, Image.Image) else masks
        if not isinstance(pictures, list | tuple) or not all(isinstance(each, Image.Image) for each in pictures):
            raise ValueError(
                f"masks must be PIL images or a bool tensor, got {type(pictures).__name__}; torch.from_numpy makes a "
                "tensor of an array"
            )
        masks = from_pil(pictures, size, channels=1, background=0)[:, 0] > 0  # transparent parts are not marked
    if masks.dtype != torch.bool:
        raise ValueError(f"a mask tensor must be bool, True where the image is generated anew; got {masks.dtype}")
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.shape[0] not in (1, count) or tuple(masks.shape[1:]) != tuple(size):
        height, width = size
        raise ValueError(
            f"masks must have shape ({height}, {width}) or ({count}, {height}, {width}) for {count} images of "
            f"{height}x{width}, got {tuple(masks.shape)}"
        )
    return masks.expand(count, -1, -1)


def token_masks(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """Pixel masks (B, H, W) as bool (B, h * w): True for a token of the (h, w) grid if any of its pixels is masked.

    Raises:
        ValueError: the grid does not divide the image.
    """
    (height, width), (rows, columns) = masks.shape[1:], grid
    if height % rows or width % columns:
        raise ValueError(f"a grid of {rows}x{columns} tokens does not divide masks of {height}x{width}")
    return F.max_pool2d(masks[:, None].float(), (height // rows, width // columns)).flatten(1) > 0


def scale_masks(regenerate: Tensor, scales: Sequence[Sequence[int]], *, whole: int = 3) -> Tensor:
    """Masks (B, h, w) of the largest grid as bool (B, L) of all scales: True where a token is generated anew.

    The mask of kept tokens is resized bilinearly to each grid; a token is kept where the result is above one half.
    Grids of at most ``whole`` tokens are always kept, because their tokens describe the whole image. (VAR, arXiv
    2404.02905, section 5.2.)

    Raises:
        ValueError: the masks are not of the last grid.
    """
    if regenerate.ndim != 3 or tuple(regenerate.shape[1:]) != tuple(scales[-1]):
        raise ValueError(f"masks must be (B, {scales[-1][0]}, {scales[-1][1]}), got {tuple(regenerate.shape)}")
    keep, parts = (~regenerate.bool())[:, None].float(), []
    for height, width in scales:
        small = F.interpolate(keep, size=(height, width), mode="bilinear") > 0.5
        parts.append((small if height * width > whole else torch.ones_like(small)).flatten(1))
    return ~torch.cat(parts, 1)


def box_mask(box: Sequence[float], grid: tuple[int, int]) -> Tensor:
    """A bool mask (h, w) of a grid, True inside a box [top, left, bottom, right] in shares of the sides.

    Raises:
        ValueError: the box reaches outside the image, or its edges are not in order.
    """
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= 1 and 0 <= left <= right <= 1):
        raise ValueError(f"a box is [top, left, bottom, right] in shares of the sides, 0 to 1; got {list(box)}")
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[round(top * grid[0]) : round(bottom * grid[0]), round(left * grid[1]) : round(right * grid[1])] = True
    return mask
