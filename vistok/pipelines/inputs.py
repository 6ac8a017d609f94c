"""What users hand to a pipeline beside words, as its tokenizer reads it: the first frames of clips, masks of images."""

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
"""See ``Pipeline.reconstruct``; masks see ``Pipeline.edit``."""

Frames = np.ndarray | Tensor | Sequence[Image.Image]
"""The first frames of clips; see ``Pipeline.given``."""


def first_frames(tokenizer: Tokenizer, frames: Frames) -> Tensor:
    """Whole clips (B, C, T, H, W) in [-1, 1] that begin with these frames, the last of which is repeated.

    Raises:
        ValueError: a tokenizer of images, other shapes, or more frames than a clip has.
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
    """Which tokens of images a mask covers, (B, L) bool.

    Args:
        masks: as in ``Pipeline.edit``.
        pixels: the images, (B, C, H, W).
        grid: (h, w) of the tokens' places in an image; None if they have none.
        scales: of tokens in scales, the grids.

    Raises:
        ValueError: tokens without a place in the image, or masks that do not fit the images.
    """
    places = scales[-1] if scales else grid
    if places is None:
        raise ValueError("the tokens of this tokenizer have no place in the image, so a part of it has none either")
    masks = pixel_masks(masks, len(pixels), (pixels.shape[2], pixels.shape[3]))
    covered = token_masks(masks, places)
    return scale_masks(covered.unflatten(1, places), scales) if scales else covered
