"""What a report is made of, and the writing of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vistok.utils.files import atomic_file

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_FILE = "report.html"
LARGE = 1 << 20
"""Pixels from which on a picture is stored as WebP, with loss: a page of large PNGs has tens of megabytes."""


class Block:
    """A part of a section; the macro of the same name in ``blocks.html`` shows it."""

    def html(self) -> str:
        return getattr(_macros(), type(self).__name__)(self)


@dataclass(frozen=True)
class Paragraph(Block):
    text: str


@dataclass(frozen=True)
class Picture(Block):
    """An image with a caption.

    Attributes:
        description: for readers who do not see it.
        scale: CSS pixels per image pixel. Above 1, pixels stay sharp-edged.
    """

    image: Image.Image
    caption: str
    description: str
    scale: float = 1.0

    @property
    def source(self) -> str:
        return data_uri(self.image)

    @property
    def width(self) -> int:
        """The width on the page, in CSS pixels."""
        return round(self.image.width * self.scale)


@dataclass(frozen=True)
class Animation(Block):
    """A GIF that plays by itself, with sharp-edged pixels and a caption.

    Attributes:
        gif: the file's content.
        width: in CSS pixels.
        description: for readers who do not see it.
    """

    gif: bytes
    width: int
    caption: str
    description: str

    @property
    def source(self) -> str:
        return f"data:image/gif;base64,{base64.b64encode(self.gif).decode('ascii')}"


@dataclass(frozen=True)
class Slider(Block):
    """Pictures of one size that the reader goes through; a page without its script shows the last.

    Attributes:
        pictures: in order; the caption of each is what the slider says there.
    """

    pictures: Sequence[Picture]
    caption: str


@dataclass(frozen=True)
class Score:
    """A line of a score table.

    Attributes:
        value: as it is shown.
        target: as it is shown; empty for scores without one.
        met: whether the target is met; None without one.
        meaning: in one line.
    """

    name: str
    value: str
    meaning: str
    target: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """The target, and whether it is met."""
        return self.target + {True: " ✓", False: " ✗ missed", None: ""}[self.met]

    @property
    def state(self) -> str:
        return {True: "met", False: "missed", None: ""}[self.met]


@dataclass(frozen=True)
class ScoreTable(Block):
    scores: Sequence[Score]


@dataclass(frozen=True)
class Table(Block):
    """Rows with the same keys, which head the columns; numbers are aligned right, None is a dash.

    Attributes:
        best: (row, column) of cells that stand out.
    """

    rows: Sequence[Mapping[str, Any]]
    best: frozenset[tuple[int, str]] = frozenset()

    @property
    def numeric(self) -> set[str]:
        """The columns of numbers."""
        return {key for key in self.rows[0] if all(isinstance(row[key], int | float | None) for row in self.rows)}


@dataclass(frozen=True)
class Notes(Block):
    """What the reader has to know before comparing."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Commands(Block):
    """Shell commands to copy; lines that begin with # are set back as comments."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Facts(Block):
    """Names and values."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Folded(Block):
    """A block that the reader opens by its title."""

    title: str
    block: Block


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def write_report(path: str | Path, *, title: str, kicker: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the HTML file, whole or not at all.

    Args:
        title: the headline; also of the browser's tab.
        kicker: a small line above it.
        lead: the first paragraph: what came out.
    """
    slides = any(isinstance(block, Slider) for section in sections for block in section.blocks)
    page = (
        _environment()
        .get_template("page.html")
        .render(title=title, kicker=kicker, lead=lead, sections=sections, slides=slides)
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


@cache
def _macros() -> Any:
    return _environment().get_template("blocks.html").module


@cache
def _environment() -> Environment:
    """jinja2 over the templates of this folder: every value is escaped, a misspelt one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["cell"] = cell_text
    return made


def cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.4g}".rstrip(".") if isinstance(value, float) else str(value)


def data_uri(image: Image.Image) -> str:
    """The image itself as the address of an ``img`` element."""
    large = image.width * image.height > LARGE
    kind, options = ("webp", {"quality": 90}) if large else ("png", {"optimize": True})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
