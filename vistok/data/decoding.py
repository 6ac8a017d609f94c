"""The one way from an image file to an 8-bit image of mode L or RGB."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vistok.data.files import UNPACKING_ERRORS
from vistok.data.formats import decoders

Reading = Literal["photo", "raw"]
"""How a file is read. ``photo``: upright as its EXIF data say, transparent parts on white, 16 bits scaled to 8.
``raw``: as ADM's suite and its kin read: Pillow's ``convert("RGB")``, which ignores orientation and drops alpha."""

LARGE = 50_000_000
"""Pixels above which an image that will be made much smaller is made so while it is decoded, where its format has that
(JPEG), or else as soon as it is (reading ``photo``)."""
STRIP = 1 << 22
"""Pixels that are converted at a time."""
ORIENTATION, TURNED_SIDEWAYS = 0x0112, (5, 6, 7, 8)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow clips these to 8 bit instead of scaling them
GREY_SCALES = {"L;2": 85, "L;4": 17}
"""The factors by which Pillow multiplies the grey levels of PNG files of 2 and 4 bits."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# What Pillow's decoders, and the archives behind them, are known to raise on damaged files.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    *UNPACKING_ERRORS,
    Image.DecompressionBombError,
)

T = TypeVar("T")


class Header(NamedTuple):
    """What is known of an image before its pixels are decoded.

    Attributes:
        size: (H, W) of what the decoder gives, but for large images that it makes smaller.
        turned: whether its EXIF data ask for another orientation.
        transparent: whether it has an alpha channel or a transparent colour.
        deep: whether it has more than 8 bits per channel.
    """

    size: tuple[int, int]
    turned: bool
    transparent: bool
    deep: bool


class Levels(NamedTuple):
    """What the grey levels of more than 8 bits mean: 0 .. 2^bits - 1, where 0 may be white."""

    bits: int = 16
    white_is_zero: bool = False


@dataclass(frozen=True)
class Decoder:
    """How image files become 8-bit images.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        reading: see ``Reading``.
        side: the short side that the image will be brought to, if that is known.
        background: grey level that shows through transparent parts.
    """

    channels: int = 3
    reading: Reading = "photo"
    side: int | None = None
    background: int = 255

    @property
    def mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def read(self, file: IO[bytes]) -> Image.Image:
        """Decode a file, which is left open.

        Raises:
            one of ``DECODING_ERRORS``.
        """
        return _read(file, self.convert)

    def header(self, file: IO[bytes]) -> Header:
        """Look at a file without decoding more than needed; raises as ``read`` does."""
        return _read(file, self._header)

    def convert(self, image: Image.Image) -> Image.Image:
        """Any PIL image to mode L or RGB.

        Raises:
            ValueError: 32-bit integers, or floats outside [0, 1], which do not say which value is white.
            one of ``DECODING_ERRORS``: from decoding, where it is not decoded yet.
        """
        if self.reading == "raw":
            if image.mode in DEEP_MODES:
                raise ValueError(
                    f"it has more than 8 bits per channel (mode {image.mode}), which this protocol's peers clip to "
                    "white; store 8-bit images"
                )
            image.load()
            return image if image.mode == self.mode else image.convert(self.mode)
        # Twice the side that is wanted, of an image that is large enough to be read smaller.
        enough = 2 * self.side if self.side is not None and image.width * image.height > LARGE else None
        if enough and image.format in ("JPEG", "MPO"):
            image.draft(None, (enough, enough))
        pixels = _still_webp(image) if enough and image.format == "WEBP" else None
        if pixels is None:
            image.load()
        # Pillow turns TIFF files while it decodes; its versions of 2023 leave the tag as it was.
        orientation = None if image.format == "TIFF" else _orientation(image)
        transparent = _is_transparent(image)
        levels = _levels(image) if image.mode in DEEP_MODES else None
        # A power of two that leaves twice the side that is wanted, as ``draft`` does.
        factor = 1 << max(0, (min(image.size) // enough).bit_length() - 1) if enough else 1
        if image.mode != self.mode or transparent or factor > 1 or pixels is not None:
            strips = image if pixels is None else PixelRows(pixels)
            image = _in_strips(strips, self.mode, factor, lambda strip: self._eight_bit(strip, levels, transparent))
        return image if orientation is None else image.transpose(orientation)

    def _eight_bit(self, image: Image.Image, levels: Levels | None, transparent: bool) -> Image.Image:
        """An image, or a strip of one, as ``mode``; ``levels`` are those of more than 8 bits."""
        if levels is not None:
            image = _eight_bit(image, levels)
        if transparent:
            image = image.convert("RGBA")
            below = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(below, image)
        return image if image.mode == self.mode else image.convert(self.mode)

    def _header(self, image: Image.Image) -> Header:
        turned, sideways = False, False
        if image.format != "PNG" or "exif" in image.info:  # else Pillow would decode a PNG to look for it
            turned = _orientation(image) is not None
        if image.format == "TIFF":
            image.load()  # Pillow turns these while it decodes, some versions without a change of size before
        elif turned:
            sideways = self.reading == "photo" and _tag(image) in TURNED_SIDEWAYS
        size = (image.width, image.height) if sideways else (image.height, image.width)
        return Header(size, turned, _is_transparent(image), image.mode in DEEP_MODES)


def open_image(file: IO[bytes]) -> Image.Image:
    """Look at an image file of a format that is read; raises one of ``DECODING_ERRORS``."""
    try:
        image = Image.open(file, formats=decoders())
    except UnidentifiedImageError as error:  # whose own words are about a Python object
        raise UnidentifiedImageError("no image that can be read; empty, damaged, or of another format") from error
    except (
        Image.DecompressionBombError
    ) as error:  # Pillow says how many pixels it has, how many are read, and of attacks
        raise Image.DecompressionBombError(f"{str(error).partition(',')[0]}; store it smaller") from error
    transparent = image.info.get("transparency")
    # Pillow scales levels of other than 8 bits, and leaves the transparent one as the file has it.
    raw = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if raw in GREY_SCALES and isinstance(transparent, int):
        image.info["transparency"] = transparent * GREY_SCALES[raw]
    elif raw == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    return image


def _read(file: IO[bytes], use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of the image in a file; a PNG of which Pillow refuses what no pixel needs (long texts, damaged
    chunks) is read without that."""
    start = file.tell()
    try:
        with open_image(file) as image:
            return use(image)
    except Image.DecompressionBombError:
        raise
    except DECODING_ERRORS:
        file.seek(start)
        pixels = _only_pixels(file) if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE else None
        if pixels is None:  # nothing else is to blame
            raise
    with open_image(io.BytesIO(pixels)) as image:
        return use(image)


def _only_pixels(png: IO[bytes]) -> bytes | None:
    """A PNG file, of which the signature has been read, without the chunks that no conversion here looks at; None if it
    has none. Of a damaged file no more is read than the headers of its chunks.

    Raises:
        ValueError: it is Apple's form of PNG.
    """
    kept: list[tuple[int, int]] = []
    has_others, position = False, png.tell()
    while len(header := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"CgBI":
            raise ValueError(
                "it is Apple's form of PNG for iOS (CgBI); convert it, for example by `sips -s format png`"
            )
        if not kind.isalpha():  # no chunk, so this is where it is damaged
            break
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and _is_whole(png.read(length + 4), kind)):
            kept.append((position, 12 + length))
        else:
            has_others = True
        if kind == b"IEND":
            break
        position = png.seek(position + 12 + length)
    if not has_others:
        return None
    parts = [PNG_SIGNATURE]
    for place, length in kept:
        png.seek(place)
        parts.append(png.read(length))
    return b"".join(parts)


def _is_whole(content: bytes, kind: bytes) -> bool:
    """Whether the content of a chunk, with the checksum behind it, fits that."""
    return zlib.crc32(kind + content[:-4]).to_bytes(4, "big") == content[-4:]


def _tag(image: Image.Image) -> int | None:
    """The EXIF orientation; None if there is none, or if the EXIF data are damaged, which the pixels need not be."""
    try:
        return image.getexif().get(ORIENTATION)
    except (*DECODING_ERRORS, AttributeError, RecursionError):
        return None


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What brings the image upright; None if nothing need be done."""
    by_tag: dict[int | None, Image.Transpose] = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return by_tag.get(_tag(image))


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


class PixelRows:
    """Pixels (H, W, 3 or 4) of which rows become images when they are asked for."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels, self.size = pixels, (pixels.shape[1], pixels.shape[0])

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """The rows of a box, which is as wide as all."""
        _, top, _, bottom = box
        return Image.fromarray(np.ascontiguousarray(self._pixels[top:bottom]))


def _still_webp(image: Image.Image) -> np.ndarray | None:
    """The pixels (H, W, 3 or 4) of a WebP file by torchvision, which holds one copy of them where Pillow holds four;
    None for a moving one, or where torchvision cannot."""
    file = getattr(image, "fp", None)
    if file is None or getattr(image, "n_frames", 1) > 1:
        return None
    try:
        from torchvision.io import ImageReadMode, decode_webp

        file.seek(0)
        content = np.frombuffer(file.read(), np.uint8).copy()
        mode = ImageReadMode.RGB_ALPHA if _is_transparent(image) else ImageReadMode.RGB
        return decode_webp(torch.from_numpy(content), mode).permute(1, 2, 0).numpy()
    except (ImportError, AttributeError, RuntimeError, OSError, ValueError):  # built without it; or Pillow says what is
        return None  # wrong with the file


def _in_strips(
    image: Image.Image | PixelRows, mode: str, factor: int, change: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """What ``change`` makes of an image, of ``mode``, reduced by ``factor``; of a large one a strip at a time, so that
    no second one of its size is held."""

    def small(strip: Image.Image) -> Image.Image:
        return change(strip) if factor == 1 else change(strip).reduce(factor)

    width, height = image.size
    rows = max(STRIP // max(width, 1) // factor, 1) * factor
    if rows >= height:
        return small(image if isinstance(image, Image.Image) else image.crop((0, 0, width, height)))
    result = Image.new(mode, (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        result.paste(small(image.crop((0, top, width, min(top + rows, height)))), (0, top // factor))
    return result


def _eight_bit(image: Image.Image, levels: Levels) -> Image.Image:
    """An image of more than 8 bits as mode L or LA."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    grey = (values >> (levels.bits - 8)).astype(np.uint8)  # as Pillow itself reads 16-bit RGB
    result = Image.fromarray(255 - grey if levels.white_is_zero else grey)
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _levels(image: Image.Image) -> Levels:
    """What the levels of an image of more than 8 bits mean.

    Raises:
        ValueError: they could mean anything: 32-bit integers, or floats outside [0, 1].
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PNG has no more than 16 bits
        tags = getattr(image, "tag_v2", {})  # of TIFF files, which Pillow gives as they are stored
        (bits, *_) = tags.get(BITS_PER_SAMPLE, (16,))
        return Levels(bits, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F" and 0 <= low <= high <= 1:
        return Levels()
    kind = "floats" if image.mode == "F" else "32-bit integers"
    known = "floats are read within [0, 1] only" if image.mode == "F" else "which of them is white is not known"
    raise ValueError(f"its pixels are {kind} of {low:g} to {high:g}; {known}: store it with 8 or 16 bits")
