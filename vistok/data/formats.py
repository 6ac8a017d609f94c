"""The image formats that training, evaluation and pipelines read."""

from __future__ import annotations

from functools import cache

LOSSY = {
    ".png": False,
    ".jpg": True,
    ".jpeg": True,
    ".webp": True,
    ".bmp": False,
    ".gif": False,
    ".tif": False,
    ".tiff": False,
}
"""Extensions, and whether their compression is usually lossy. Of several frames only the first one is read."""
DECODERS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""Pillow's names of the formats that are tried, whatever the extension. Pillow must not try all that it knows: it hands
PostScript to an external program."""
LOSSY_IF_READABLE = {".avif": True, ".heic": True, ".heif": True}
"""Formats that only some builds of Pillow, or plug-ins that register themselves, can decode."""

TEXT = ".txt"
"""The extension of a file that holds the caption of the image of the same name."""


@cache
def image_extensions() -> tuple[str, ...]:
    """The extensions of files that are read as images."""
    from PIL import Image

    formats = Image.registered_extensions()
    return (*LOSSY, *(name for name in LOSSY_IF_READABLE if formats.get(name) in Image.OPEN))


@cache
def decoders() -> tuple[str, ...]:
    """The entries of ``DECODERS`` that this Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in DECODERS if name in Image.OPEN)


def extension(name: str) -> str:
    """What follows the last dot of a file's name, with the dot, in lower case; "" if there is none."""
    stem, dot, last = name.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if dot and stem else ""


def without_extension(name: str) -> str:
    """A file's name up to its extension."""
    return name[: len(name) - len(extension(name))]


def is_image(name: str) -> bool:
    return extension(name) in image_extensions()


def is_lossy(name: str) -> bool:
    return (LOSSY | LOSSY_IF_READABLE).get(extension(name), False)
