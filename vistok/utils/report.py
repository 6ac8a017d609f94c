"""Reports: one HTML file with its pictures inside, which opens anywhere and needs no network."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from vistok.utils.files import atomic_file


class Block(ABC):
    """A part of a report's section."""

    @abstractmethod
    def html(self) -> str: ...


@dataclass(frozen=True)
class Paragraph(Block):
    text: str

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Picture(Block):
    """An image with a caption.

    Attributes:
        description: for readers who do not see it.
        scale: CSS pixels per image pixel. From 1 on, pixels stay sharp-edged.
    """

    image: Image.Image
    caption: str
    description: str
    scale: float = 1.0

    def html(self) -> str:
        data = base64.b64encode(png_bytes(self.image)).decode("ascii")
        pixels = ' class="pixels"' if self.scale >= 1 else ""
        width = round(self.image.width * self.scale)
        source = f"data:image/png;base64,{data}"
        return (
            f'<figure><img{pixels} src="{source}" width="{width}" alt="{escape(self.description)}">'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


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

    def html(self) -> str:
        source = f"data:image/gif;base64,{base64.b64encode(self.gif).decode('ascii')}"
        return (
            f'<figure><img class="pixels" src="{source}" width="{self.width}" alt="{escape(self.description)}">'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


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


@dataclass(frozen=True)
class ScoreTable(Block):
    scores: Sequence[Score]

    def html(self) -> str:
        head = '<tr><th>score</th><th class="number">value</th><th>target</th><th>what it says</th></tr>'
        rows = "\n".join(map(self._row, self.scores))
        return f'<div class="scroll"><table>\n{head}\n{rows}\n</table></div>'

    @staticmethod
    def _row(score: Score) -> str:
        state = {True: " met", False: " missed", None: ""}[score.met]
        return (
            f'<tr><td class="name">{escape(score.name)}</td><td class="number">{escape(score.value)}</td>'
            f'<td class="target{state}">{escape(score.verdict)}</td>'
            f'<td class="meaning">{escape(score.meaning)}</td></tr>'
        )


@dataclass(frozen=True)
class Commands(Block):
    """Shell commands to copy; lines that begin with # are set back as comments."""

    lines: Sequence[str]

    def html(self) -> str:
        shown = (
            f'<span class="comment">{escape(line)}</span>' if line.startswith("#") else escape(line)
            for line in self.lines
        )
        return f"<pre>{chr(10).join(shown)}</pre>"


@dataclass(frozen=True)
class Facts(Block):
    """Names and values."""

    values: Mapping[str, str]

    def html(self) -> str:
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.values.items())
        return f"<dl>{items}</dl>"


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        return "\n".join([f"<section>\n<h2>{escape(self.title)}</h2>", *(b.html() for b in self.blocks), "</section>"])


def write_report(path: str | Path, *, title: str, kicker: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the HTML file, whole or not at all.

    Args:
        title: the headline; also of the browser's tab.
        kicker: a small line above it.
        lead: the first paragraph: what came out.
    """
    header = f'<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>'
    body = "\n".join([header, *(section.html() for section in sections)])
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    with atomic_file(path) as temporary:
        temporary.write_text(template.substitute(title=escape(title), body=body), encoding="utf-8")


@dataclass(frozen=True)
class Panel:
    """One curve of a metrics.jsonl.

    Attributes:
        title: of the panel, with the unit.
        steps, values: the curve.
    """

    title: str
    steps: Sequence[int]
    values: Sequence[float]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]], name: str, title: str) -> Panel:
        """The curve of metric ``name`` in the rows of a metrics.jsonl."""
        rows = [row for row in rows if name in row]
        return cls(title, [int(row["step"]) for row in rows], [row[name] for row in rows])


def draw_curves(panels: Sequence[Panel]) -> Image.Image:
    """Curves side by side, two image pixels per CSS pixel of a report's column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.1), dpi=200, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.plot(panel.steps, panel.values, color="#2f5d9b", linewidth=1.4, marker="." if len(panel.steps) < 3 else "")
        axis.set_title(panel.title, loc="left", fontsize=8, color="#1c1e21")
        axis.set_xlabel("step", fontsize=7, color="#5f6670")
        axis.tick_params(labelsize=7, colors="#5f6670", length=2.5, width=0.6)
        axis.grid(axis="y", color="#eceef1", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.margins(x=0.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set(color="#c9cdd3", linewidth=0.6)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
