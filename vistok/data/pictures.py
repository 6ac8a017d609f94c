"""From pixels to pictures (8-bit values, PIL images, grids, PNG and ADM-style .npz files), and from photos to pixels.

Pixels are float (B, C, H, W) in [-1, 1], C = 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vistok.data.decoding import DECODING_ERRORS, ImageDecoder, open_image
from vistok.data.formats import image_extensions
from vistok.data.transforms import center_crop_adm, to_pixels
from vistok.utils.files import atomic_file

GAP = 2  # white pixels between the images of a grid


def to_uint8(
    pixels: Tensor, *, gain: float = 127.5, offset: float = 128.0, rounding: Literal["truncate", "nearest"] = "truncate"
) -> Tensor:
    """Float pixels to uint8 of the same shape: ``gain * x + offset``, clamped to 0..255, then rounded.

    The defaults are the rule of ADM, LlamaGen and GigaTok for pixels in [-1, 1]: 127.5 x + 128, truncated. This rounds
    (x + 1) / 2 * 255 half up, so that an 8-bit image survives the round trip. To truncate (x + 1) / 2 * 255 itself,
    a common mistake, leaves about half of all pixels one level too dark.

    Raises:
        ValueError: integer pixels, a value that is not finite, or an unknown ``rounding``.
    """
    if not pixels.is_floating_point():
        raise ValueError(f"expected float pixels, got {pixels.dtype}")
    if not bool(pixels.isfinite().all()):
        bad = int((~pixels.isfinite()).sum())
        raise ValueError(
            f"{bad} of {pixels.numel()} pixel values are NaN or infinite; such images cannot be shown or scored"
        )
    scaled = (gain * pixels.float() + offset).clamp(0, 255)
    if rounding == "nearest":
        scaled = scaled.round()
    elif rounding != "truncate":
        raise ValueError(f"unknown rounding {rounding!r}; known: 'truncate', 'nearest'")
    return scaled.to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, C, H, W) to B images of mode L or RGB.

    Raises:
        ValueError: another shape than (B, 1 or 3, H, W), or values that are not finite.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"pictures need pixels (B, 1 or 3, H, W), got shape {tuple(pixels.shape)}")
    arrays = to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def from_pil(images: Sequence[Image.Image], size: tuple[int, int], channels: int, *, background: int = 255) -> Tensor:
    """Images of any size to pixels (B, channels, H, W): turned upright, with ADM's centre crop, grey or RGB.

    Args:
        size: (height, width), which must be equal.
        background: grey level that shows through transparent parts.

    Raises:
        ValueError: no images, an item that is not a PIL image, a size that is not square, or pixels of which it is
            unknown which value is white (see ``ImageDecoder.convert``).
    """
    height, width = size
    if height != width:
        raise ValueError(f"images are cropped to squares, but {height}x{width} was asked for; pass pixels instead")
    if not isinstance(images, Sequence):
        raise ValueError(f"images must be a list of PIL images, got {type(images).__name__}")
    if not len(images):
        raise ValueError("there are no images")
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"images must be PIL images, got {type(image).__name__}; PIL.Image.open reads a file")
    decoder = ImageDecoder(channels, side=height, background=background)
    converted = [decoder.convert(image) for image in images]
    cropped = [image if image.size == (width, height) else center_crop_adm(image, height) for image in converted]
    arrays = np.stack([np.asarray(image).reshape(height, width, channels) for image in cropped])
    return to_pixels(arrays)


def open_picture(path: str | Path, decoder: ImageDecoder | None = None) -> Image.Image:
    """Decode an image file, and convert it with ``decoder`` if there is one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image file {path}")
    try:
        with path.open("rb") as file:
            if decoder is not None:
                return decoder.read(file)
            with open_image(file) as image:
                image.load()
                return image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: {error}; expected {' '.join(image_extensions())}") from error
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} is damaged or cannot be decoded: {error}") from error


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in a grid, row by row, with thin white lines between them.

    Args:
        columns: images per row; None makes the grid about square.

    Raises:
        ValueError: no images, or images of different sizes.
    """
    columns, rows = layout(images, columns)
    (width, height), mode = images[0].size, images[0].mode
    sheet = Image.new(mode, (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        sheet.paste(image, (column * (width + GAP), row * (height + GAP)))
    return sheet


def layout(images: Sequence[Image.Image], columns: int | None = None) -> tuple[int, int]:
    """The columns and rows of a grid of images.

    Args:
        columns: the most images per row; None makes the grid about square.

    Raises:
        ValueError: no images, or images of different sizes.
    """
    if not images:
        raise ValueError("there are no images to lay out")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"a grid needs images of one size, got {sorted(sizes)}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    return columns, math.ceil(len(images) / columns)


def comparison(originals: Tensor, reconstructions: Tensor, columns: int = 8) -> Image.Image:
    """A grid of images (B, C, H, W): each row of originals lies above the row of its reconstructions."""
    above, below = to_pil(originals), to_pil(reconstructions)
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} originals do not pair with {len(below)} reconstructions")
    columns = min(columns, len(above))
    padding = [Image.new(above[0].mode, above[0].size, "white")] * (-len(above) % columns)
    above, below = above + padding, below + padding
    starts = range(0, len(above), columns)
    return grid([image for i in starts for side in (above, below) for image in side[i : i + columns]], columns)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG file; it appears whole or not at all."""
    with atomic_file(path, durable=False) as temporary:
        image.save(temporary, format="PNG")


class NpzWriter:
    """Appends images to the array that :func:`npz_writer` opens."""

    def __init__(self, member: IO[bytes], count: int) -> None:
        self._member, self._count = member, count
        self._shape: tuple[int, ...] | None = None
        self._written = 0

    def write(self, images: Iterable[Image.Image]) -> None:
        """Append images; grey ones are repeated to RGB, which is what the evaluators read.

        Raises:
            ValueError: an image of another size than the first.
        """
        for image in images:
            array = np.asarray(image.convert("RGB"))  # (H, W, 3)
            if self._shape is None:
                self._shape = array.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *array.shape)}
                np.lib.format.write_array_header_1_0(self._member, header)
            if array.shape != self._shape:
                raise ValueError(f"an .npz holds images of one size: {array.shape} follows {self._shape}")
            self._member.write(np.ascontiguousarray(array).data)
            self._written += 1

    def check_complete(self) -> None:
        """Raise ValueError unless the number of images is that of the header."""
        if self._written != self._count:
            raise ValueError(f"{self._count} images were announced, {self._written} were written")


@contextmanager
def npz_writer(path: str | Path, count: int) -> Iterator[NpzWriter]:
    """Stream ``count`` images into an ADM-style .npz: ``arr_0``, uint8 (count, H, W, 3), uncompressed.

    The file appears whole or not at all.

    Raises:
        ValueError: on leaving, if another number of images was written.
    """
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        writer = NpzWriter(member, count)
        yield writer
        writer.check_complete()
