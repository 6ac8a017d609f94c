"""Variants of a digit: turned, slanted, thin or bold, by transforms whose strength is drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter


class Variant(NamedTuple):
    """One way to show a digit.

    Attributes:
        words: added to captions and names, such as "slanted"; empty for the digit as it is.
        apply: (grey image, strength in [0, 1)) to an image of the same size.
    """

    words: str
    apply: Callable[[Image.Image, float], Image.Image]


def unchanged(image: Image.Image, strength: float) -> Image.Image:
    return image


def turned(degrees: float) -> Callable[[Image.Image, float], Image.Image]:
    """A rotation to the left by ``degrees``; the strength has no effect."""
    return lambda image, strength: image.rotate(degrees, Image.Resampling.BICUBIC)


def slanted(image: Image.Image, strength: float) -> Image.Image:
    """Shear to the right, by 0.3 to 0.5 of the height."""
    shear = 0.3 + 0.2 * strength
    row = (1, shear, -shear * (image.height - 1) / 2, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, row, Image.Resampling.BICUBIC)


def thin(image: Image.Image, strength: float) -> Image.Image:
    """Make strokes a few pixels narrower, and as bright as before."""
    low = 0.27 + 0.06 * strength
    return _stretched(image.filter(ImageFilter.MinFilter(3)), low, low + 0.45)


def bold(image: Image.Image, strength: float) -> Image.Image:
    """Make strokes a few pixels wider."""
    return _stretched(image, 0.05, 0.55 - 0.1 * strength)


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    """Stretch brightness from [``low``, ``high``] to [0, 1]: the blurred edges of strokes move, so that strokes widen
    or narrow."""
    values = (np.asarray(image, dtype=np.float32) / 255 - low) / (high - low)
    return Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8))


PLAIN = Variant("", unchanged)
STYLES = (PLAIN, Variant("slanted", slanted), Variant("thin", thin), Variant("bold", bold))
VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "turned": (PLAIN, Variant("turned left", turned(45)), Variant("turned right", turned(-45))),
    "styled": STYLES,
}
"""The variants of each digit, by ``data.name``."""
