"""Decodes image files to 8-bit images of mode L or RGB; all of vistok reads images with it."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vistok.data.files import UNPACKING_ERRORS
from vistok.data.formats import decoders

Reading = Literal["photo", "raw"]
"""How a file is read. ``photo``: upright as its EXIF data say, transparent parts on white, 16 bits scaled to 8.
``raw``: as ADM's evaluation suite and similar ones read it, with Pillow's ``convert("RGB")``, which ignores orientation
and drops alpha."""

LARGE = 50_000_000
"""Number of pixels above which ``photo`` reads an image at a reduced size: JPEG while it is decoded, other formats
right afterwards."""
STRIP = 1 << 22
"""Pixels that are converted at a time."""
ORIENTATION, TURNED_SIDEWAYS = 0x0112, (5, 6, 7, 8)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow clips these to 8 bit instead of scaling them
GREY_SCALES = {"L;2": 85, "L;4": 17}
"""The factors by which Pillow multiplies the grey levels of PNG files of 2 and 4 bits."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTING = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""The chunks of a PNG that may hold its orientation, before or behind its pixels."""
ORIENTING_TEXTS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
"""Pillow's names of what these chunks hold, if it is an orientation: EXIF data, those of ImageMagick, Adobe's XMP."""

# What Pillow's decoders, and the archives that files are read from, are known to raise on damaged files.
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
        size: (H, W) of the decoded image; large images may be decoded to a smaller one.
        turned: whether its EXIF data ask for another orientation.
        transparent: whether it has an alpha channel or a transparent colour.
        deep: whether it has more than 8 bits per channel.
    """

    size: tuple[int, int]
    turned: bool
    transparent: bool
    deep: bool


class Levels(NamedTuple):
    """The range of grey levels of more than 8 bits: 0 .. 2^bits - 1, and whether 0 is white."""

    bits: int = 16
    white_is_zero: bool = False


@dataclass(frozen=True)
class ImageDecoder:
    """How image files become 8-bit images.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        reading: see ``Reading``.
        side: the short side that the image will be resized to, if it is known; large images are then decoded smaller.
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
        """Decode a file, and leave it open.

        Raises:
            One of ``DECODING_ERRORS``.
        """
        return _read(file, self.convert)

    def header(self, file: IO[bytes]) -> Header:
        """Read the header of a file without decoding more than needed; raises the errors of ``read``."""
        return _read(file, self._header)

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert any PIL image to mode L or RGB.

        Raises:
            ValueError: 32-bit integers, or floats outside [0, 1], of which it is unknown which value is white; with
                reading ``raw``, any image of more than 8 bits.
            One of ``DECODING_ERRORS``: the image was not decoded yet, and decoding fails.
        """
        if self.reading == "raw":
            if image.mode in DEEP_MODES:
                raise ValueError(
                    f"it has more than 8 bits per channel (mode {image.mode}), which this protocol's peers clip to "
                    "white; store 8-bit images"
                )
            image.load()
            return _converted(image, self.mode)
        # Large images are reduced to no less than twice the wanted side.
        enough = 2 * self.side if self.side is not None and image.width * image.height > LARGE else None
        if enough and image.format in ("JPEG", "MPO"):
            image.draft(None, (enough, enough))
        pixels = _still_webp(image) if enough and image.format == "WEBP" else None
        if pixels is None:
            image.load()
        # Pillow turns TIFF files upright while it decodes them; its versions of 2023 leave the tag as it was.
        orientation = None if image.format == "TIFF" else _orientation(image)
        transparent = _is_transparent(image)
        levels = _levels(image) if image.mode in DEEP_MODES else None
        # A power of two, as in ``draft``.
        factor = 1 << max(0, (min(image.size) // enough).bit_length() - 1) if enough else 1
        if image.mode != self.mode or transparent or factor > 1 or pixels is not None:
            strips = image if pixels is None else PixelRows(pixels)
            image = _in_strips(strips, self.mode, factor, lambda strip: self._in_mode(strip, levels, transparent))
        return image if orientation is None else image.transpose(orientation)

    def _in_mode(self, image: Image.Image, levels: Levels | None, transparent: bool) -> Image.Image:
        """Convert an image, or a strip of one, to ``mode``; ``levels`` are None for 8-bit images."""
        if levels is not None:
            image = _eight_bit(image, levels)
        if transparent:
            image = image.convert("RGBA")
            below = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(below, image)
        return _converted(image, self.mode)

    def _header(self, image: Image.Image) -> Header:
        turned, sideways = False, False
        if image.format != "PNG" or _may_be_turned(image):  # else Pillow would decode a PNG to look for it
            turned = _orientation(image) is not None
        if image.format == "TIFF":
            image.load()  # Pillow turns these while it decodes, and some versions give the old size until then
        elif turned:
            sideways = self.reading == "photo" and _tag(image) in TURNED_SIDEWAYS
        size = (image.width, image.height) if sideways else (image.height, image.width)
        return Header(size, turned, _is_transparent(image), image.mode in DEEP_MODES)


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image file of one of the known formats; raises one of ``DECODING_ERRORS``."""
    try:
        image = Image.open(file, formats=decoders())
    except UnidentifiedImageError as error:  # Pillow's message would name a Python object
        raise UnidentifiedImageError("no image that can be read; empty, damaged, or of another format") from error
    except (
        Image.DecompressionBombError
    ) as error:  # Pillow says how many pixels it has, how many are read, and of attacks
        raise Image.DecompressionBombError(f"{str(error).partition(',')[0]}; store it smaller") from error
    transparent = image.info.get("transparency")
    # Pillow scales grey levels that do not have 8 bits, but not the transparent level.
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
    except Image.DecompressionBombError as error:
        sizes = re.findall(r"\d+", str(error))
        stated = f"{int(sizes[0]):,} pixels" if sizes else "too many pixels"
        raise Image.DecompressionBombError(
            f"it says that it has {stated}; up to {2 * (Image.MAX_IMAGE_PIXELS or 0):,} are read, since a small "
            "file could fill all memory. If it is sound, store it smaller"
        ) from error
    except DECODING_ERRORS:
        file.seek(start)
        pixels = _only_pixels(file) if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE else None
        if pixels is None:  # nothing else is to blame
            raise
    with open_image(io.BytesIO(pixels)) as image:
        return use(image)


class _Chunk(NamedTuple):
    """A chunk of a PNG file: its kind, where it begins in the file, and the length of its content in bytes."""

    kind: bytes
    position: int
    length: int


def _chunks(png: IO[bytes]) -> Iterator[_Chunk]:
    """The chunks of a PNG file, of which the signature has been read; the file is then behind their headers. They end
    where it is damaged."""
    position = png.tell()
    while len(header := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if not kind.isalpha():
            break
        yield _Chunk(kind, position, length)
        if kind == b"IEND":
            break
        position = png.seek(position + 12 + length)


def _may_be_turned(png: Image.Image) -> bool:
    """Whether a PNG, of which only the header was read, may hold an orientation: if not in the texts and EXIF data that
    were read, then in some behind the pixels."""
    if not ORIENTING_TEXTS.isdisjoint(png.info):
        return True
    file = getattr(png, "fp", None)
    if file is None:
        return False
    place = file.tell()
    file.seek(len(PNG_SIGNATURE))
    kinds = [chunk.kind for chunk in _chunks(file)]
    file.seek(place)
    return b"IDAT" in kinds and any(kind in ORIENTING for kind in kinds[kinds.index(b"IDAT") :])


def _only_pixels(png: IO[bytes]) -> bytes | None:
    """A PNG file, of which the signature has been read, without the chunks that no conversion here looks at; None if it
    has none. Of a damaged file no more is read than the headers of its chunks.

    Raises:
        ValueError: it is Apple's form of PNG.
    """
    kept: list[tuple[int, int]] = []
    has_others = False
    for kind, position, length in _chunks(png):
        if kind == b"CgBI":
            raise ValueError(
                "it is Apple's form of PNG for iOS (CgBI); convert it, for example by `sips -s format png`"
            )
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and _is_whole(png.read(length + 4), kind)):
            kept.append((position, 12 + length))
        else:
            has_others = True
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
    """The EXIF orientation; None if there is none, or if the EXIF data are damaged: the pixels may still be fine."""
    try:
        return image.getexif().get(ORIENTATION)
    except (*DECODING_ERRORS, AttributeError, RecursionError):
        return None


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the image upright; None if it is upright."""
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


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "LAB":  # Pillow converts it to RGB alone
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


class PixelRows:
    """Pixels (H, W, 3 or 4) with the ``size`` and ``crop`` of a PIL image, so that only strips of them are copied."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels, self.size = pixels, (pixels.shape[1], pixels.shape[0])

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """The rows from top to bottom of ``box``, at full width."""
        _, top, _, bottom = box
        return Image.fromarray(np.ascontiguousarray(self._pixels[top:bottom]))


def _still_webp(image: Image.Image) -> np.ndarray | None:
    """The pixels (H, W, 3 or 4) of a WebP file by torchvision, which holds one copy of them where Pillow holds four.

    None for an animation, or if torchvision cannot decode it.
    """
    file = getattr(image, "fp", None)
    if file is None or getattr(image, "n_frames", 1) > 1:
        return None
    try:
        from torchvision.io import ImageReadMode, decode_webp

        file.seek(0)
        content = np.frombuffer(file.read(), np.uint8).copy()
        mode = ImageReadMode.RGB_ALPHA if _is_transparent(image) else ImageReadMode.RGB
        return decode_webp(torch.from_numpy(content), mode).permute(1, 2, 0).numpy()
    except (ImportError, AttributeError, RuntimeError, OSError, ValueError):
        return None  # torchvision is built without WebP, or the file is damaged: Pillow will say how


def _in_strips(
    image: Image.Image | PixelRows, mode: str, factor: int, change: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Apply ``change`` to an image, and reduce it by ``factor``; the result has ``mode``.

    Large images are processed strip by strip, so that memory never holds a second image of full size.
    """

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
    """The range of the levels of an image of more than 8 bits.

    Raises:
        ValueError: the range is unknown: 32-bit integers, or floats outside [0, 1].
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PNG has no more than 16 bits
        tags = getattr(image, "tag_v2", {})  # Pillow leaves the levels of TIFF files as they are stored
        (bits, *_) = tags.get(BITS_PER_SAMPLE, (16,))
        return Levels(bits, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F" and 0 <= low <= high <= 1:
        return Levels()
    kind = "floats" if image.mode == "F" else "32-bit integers"
    known = "floats are read within [0, 1] only" if image.mode == "F" else "which of them is white is not known"
    raise ValueError(f"its pixels are {kind} of {low:g} to {high:g}; {known}: store it with 8 or 16 bits")
