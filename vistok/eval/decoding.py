"""Image files to 8-bit RGB, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.data.transforms import center_crop_adm

EXTENSIONS = (".png", ".jpg", ".jpeg")
LOSSY_EXTENSIONS = (".jpg", ".jpeg")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")  # Pillow clips these to 8 bit instead of scaling them


class ImageError(ValueError):
    """A set of images that cannot be scored: empty, unreadable, of mixed sizes, or of another format."""


def common_size(sizes: Iterable[tuple[str, tuple[int, int]]]) -> tuple[int, int]:
    """The one (H, W) of named images.

    Raises:
        ImageError: they have more than one.
    """
    first: tuple[str, tuple[int, int]] | None = None
    for name, size in sizes:
        first = first or (name, size)
        if size != first[1]:
            raise ImageError(
                f"images of mixed sizes: {first[0]} is {first[1][0]}x{first[1][1]} (height x width), {name} is "
                f"{size[0]}x{size[1]}; bring all to one size first, because a resize changes the score (crop=SIZE, on "
                "the command line --crop SIZE, is the centre crop of the ImageNet papers)"
            )
    return first[1]


@contextmanager
def opened(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    """Pillow's image of a file; whatever goes wrong with it is an ImageError that tells the ``name``."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {name}: {error}") from error


def size_of(file: Path | IO[bytes], name: str) -> tuple[int, int]:
    """(H, W) of an image file, from its header."""
    with opened(file, name) as image:
        return image.height, image.width


def decode(file: Path | IO[bytes], name: str, crop: int | None) -> Tensor:
    """uint8 (3, H, W) of an image file, after ADM's centre crop if one is asked for."""
    with opened(file, name) as image:
        if image.mode in DEEP_MODES:
            raise ImageError(
                f"the image {name} has more than 8 bits per channel (mode {image.mode}); store 8-bit images"
            )
        rgb = image.convert("RGB")
    if crop is not None and rgb.size != (crop, crop):
        rgb = center_crop_adm(rgb, crop)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
