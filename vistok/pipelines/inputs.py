"""Inputs of a pipeline other than classes and texts: the first frames of clips, and masks of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from vistok.data.clips import repeat_last
from vistok.data.masks import pixel_masks, scale_masks, token_masks
from vistok.data.movies import frames_to_pixels
from vistok.tokenizers.base import Tokenizer

Images = Image.Image | Sequence[Image.Image] | Tensor
"""See ``Pipeline.reconstruct``, and for masks ``Pipeline.edit``."""

Frames = np.ndarray | Tensor | Sequence[Image.Image]
"""The first frames of clips; see ``Pipeline.given``."""


def first_frames(tokenizer: Tokenizer, frames: Frames) -> Tensor:
    """Whole clips (B, C, T, H, W) in [-1, 1] that begin with these frames; the last frame is repeated.

    Raises:
        ValueError: the tokenizer reads images or no squares, the shape is another, or a clip has fewer frames.
    """
    shape = tokenizer.input_shape
    if len(shape) != 4:
        raise ValueError(f"{type(tokenizer).__name__} reads images: there are no clips to begin with frames")
    channels, length, height, width = shape
    if height != width:
        raise ValueError(f"frames are cropped to squares, but this tokenizer reads {height}x{width}; pass condition=")
    return repeat_last(frames_to_pixels(frames, height, channels), length)


def masked_tokens(
    masks: Images, pixels: Tensor, grid: tuple[int, int] | None, scales: Sequence[Sequence[int]]
) -> Tensor:
    """(B, L) bool, True for the tokens that the masks touch.

    Args:
        masks: as in ``Pipeline.edit``.
        pixels: the images, (B, C, H, W).
        grid: (h, w) of the tokens' raster in an image; None if tokens have no place in it.
        scales: the grids of tokens in scales, else empty.

    Raises:
        ValueError: tokens have no place in the image, or masks do not fit the images.
    """
    places = scales[-1] if scales else grid
    if places is None:
        raise ValueError("the tokens of this tokenizer have no place in the image, so a part of it has none either")
    masks = pixel_masks(masks, len(pixels), (pixels.shape[2], pixels.shape[3]))
    covered = token_masks(masks, places)
    return scale_masks(covered.unflatten(1, places), scales) if scales else covered
