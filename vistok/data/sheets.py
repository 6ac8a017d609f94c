"""Grids of images with labels for columns, rows or images, in letters that stay readable beside small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vistok.data.pictures import GAP, layout

LEAST = 64
"""Images whose larger side has fewer pixels are enlarged by a whole factor to at least this size."""
TEXT = 16
"""Height of letters in pixels."""
LINE = TEXT + 6
LINES = 3
"""The most lines of a label."""
MARGIN = 6


def sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    *,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    labels: Sequence[str] = (),
    least: int = LEAST,
) -> Image.Image:
    """Images of one size in a grid on white, row by row, with labels.

    Args:
        columns: images per row; None makes the grid about square.
        column_labels: a text above each column.
        row_labels: a text left of each row.
        labels: a text below each image. Labels of columns and images have up to three lines.
        least: images whose larger side has fewer pixels are enlarged.

    Raises:
        ValueError: no images, images of different sizes, or a wrong number of labels.
    """
    columns, rows = layout(images, columns)
    for what, given, count in (
        ("columns", column_labels, columns),
        ("rows", row_labels, rows),
        ("images", labels, len(images)),
    ):
        if given and len(given) != count:
            raise ValueError(f"{len(given)} labels do not name {count} {what}")
    factor = enlargement(images[0], least)
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(TEXT)
    left = math.ceil(max(map(font.getlength, row_labels))) + MARGIN if row_labels else 0
    above = [wrapped(text, width, font) for text in column_labels]
    under = [wrapped(text, width, font) for text in labels]
    top, below = (LINE * max(map(len, texts), default=0) for texts in (above, under))
    across, down = width + GAP, height + GAP + below
    made = Image.new("RGB", (left + columns * across - GAP, top + rows * down - GAP), "white")
    draw = ImageDraw.Draw(made)
    for column, lines in enumerate(above):
        x = left + column * across + width / 2
        text = "\n".join(lines)
        draw.multiline_text((x, top / 2), text, "black", font, anchor="mm", spacing=LINE - TEXT, align="center")
    for row, text in enumerate(row_labels):
        draw.text((left - MARGIN, top + row * down + height / 2), text, "black", font, anchor="rm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = left + column * across, top + row * down
        made.paste(enlarged(image, factor), (x, y))
        if labels:
            place, text = (x + width / 2, y + height + below / 2), "\n".join(under[index])
            draw.multiline_text(place, text, "black", font, anchor="mm", spacing=LINE - TEXT, align="center")
    return made


def enlargement(image: Image.Image, least: int = LEAST) -> int:
    """The smallest whole factor that makes the larger side of an image at least ``least`` pixels."""
    return max(1, math.ceil(least / max(image.size)))


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """Enlarge an image by a whole factor, with sharp pixels."""
    return (
        image if factor == 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    )


def wrapped(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in at most ``LINES`` lines of at most ``width`` pixels; words that do not fit are cut with …."""
    lines, words = list[str](), text.split()
    while words and len(lines) < LINES:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        if len(lines) == LINES - 1:
            count = len(words)
        lines.append(shortened(" ".join(words[:count]), width, font))
        words = words[count:]
    return lines or [""]


def shortened(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut with … if it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
