"""The demo's pictures, as HTML with embedded images, so that no visitor's data are written to a file."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from vistok.utils.report.blocks import data_uri

SHOWN = 384
"""Width of a picture in CSS pixels, if there is room."""
NOTE = Markup('<p class="vt-note">{}</p>')


def note(text: str) -> str:
    """A line of text."""
    return str(NOTE.format(text))


def picture(image: Image.Image, description: str, width: int = SHOWN) -> str:
    """One picture; it is enlarged with sharp pixel edges if it is small."""
    sharp = "pixelated" if image.width < width else "auto"
    return str(
        Markup('<img class="vt-picture" style="width: {}px; image-rendering: {}" src="{}" alt="{}">').format(
            width, sharp, data_uri(image), description
        )
    )


def pictures(shown: Sequence[tuple[Image.Image, str]], width: int = SHOWN) -> str:
    """Pictures with captions, side by side if there is room."""
    figure = Markup("<figure>{}<figcaption>{}</figcaption></figure>")
    inner = Markup("").join(figure.format(Markup(picture(image, text, width)), text) for image, text in shown)
    return str(Markup('<div class="vt-row">{}</div>').format(inner))


def compare(before: Image.Image, after: Image.Image) -> str:
    """Two pictures on top of each other, with a slider that moves their border."""
    return str(
        Markup(
            '<div class="vt-compare" style="--at: 50%"><img src="{}" alt="before"><img class="vt-before" src="{}" '
            'alt="after"><input type="range" min="0" max="100" value="50" aria-label="from before to after" '
            "oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\"></div>"
        ).format(data_uri(after), data_uri(before))
    )


def error_map(before: Tensor, after: Tensor) -> Image.Image:
    """The mean absolute difference of two images (C, H, W) in [-1, 1] over their channels; white is 0.5 or more."""
    return heat((before - after).abs().mean(0), top=0.5)


def heat(values: Tensor, *, top: float | None = None) -> Image.Image:
    """Values (h, w) from 0 to ``top`` (by default the largest) as black, red, yellow, white."""
    limit = max(float(values.max()) if top is None else top, 1e-12)
    x = 3 * (values.double() / limit).clamp(0, 1).numpy()
    return Image.fromarray((255 * np.stack([np.clip(x - part, 0, 1) for part in range(3)], -1)).astype(np.uint8))


def token_map(ids: Tensor, image: Image.Image, opacity: float = 0.55) -> Image.Image:
    """An image overlaid with the colours of its tokens' ids (h, w).

    Equal ids have equal colours; different ids mostly have different ones.
    """
    size = enlarged_size(image)
    colours = np.array([[colour(int(index)) for index in row] for row in ids], dtype=np.uint8)
    over = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB").resize(size, Image.Resampling.NEAREST), over, opacity)


def token_strip(ids: Tensor, columns: int = 32) -> Image.Image:
    """The colours of ids (L,) in a row, or in rows of ``columns``."""
    rows = -(-len(ids) // columns)
    columns = min(columns, len(ids))
    colours = np.full((rows * columns, 3), 255, dtype=np.uint8)
    colours[: len(ids)] = [colour(int(index)) for index in ids]
    image = Image.fromarray(colours.reshape(rows, columns, 3))
    return image.resize((columns * 24, rows * 24), Image.Resampling.NEAREST)


def heat_map_like(values: Tensor, image: Image.Image) -> Image.Image:
    """Values (h, w) as a heat map, at the size at which ``image`` is shown."""
    return heat(values).resize(enlarged_size(image), Image.Resampling.NEAREST)


def enlarged_size(image: Image.Image) -> tuple[int, int]:
    factor = max(1, SHOWN // max(image.size))
    return image.width * factor, image.height * factor


def colour(index: int) -> tuple[int, int, int]:
    """The RGB colour of an id. Hues are multiples of the golden ratio, so that consecutive ids differ."""
    hue = index * 0.618033988749895 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (index * 7 % 10) / 10, 0.65 + 0.35 * (index * 3 % 7) / 7)
    return round(255 * red), round(255 * green), round(255 * blue)


def on_grid(values: Tensor, grid: Sequence[int] | None) -> Tensor:
    """Reshape values (L,) to their grid (h, w), or to one row (1, L) without a grid of two axes."""
    return values.reshape(tuple(grid)) if grid is not None and len(grid) == 2 else values[None]


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy (…) in bits of the distributions of logits (…, V)."""
    log = torch.log_softmax(logits.double(), -1)
    return -(log.exp() * log.clamp_min(-1e9)).sum(-1) / np.log(2)
