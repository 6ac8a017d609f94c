"""The page of a benchmark: scores, the curve over guidance scales, samples, classes, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.pictures import grid
from vistok.utils.report import Block, Commands, Paragraph, Picture, Section
from vistok.utils.report import write_report as write_page

REPORT_FILE = "report.html"
LOWER_IS_BETTER = ("fid", "clean_fid", "fd_dinov2", "frechet_distance", "sfid", "kid", "kernel_distance", "clean_kid")
CLASS_COLUMNS = (
    "Diversity is the spread of a class's features as a share of that of all images: near 0, it repeats one image. "
    "Precision is the share of its images within the manifold of the reference."
)
GRID_WIDTH = 500  # CSS pixels of a grid of samples


@dataclass(frozen=True)
class Table(Block):
    """Rows with the same keys, which head the columns; numbers are aligned right, None is a dash."""

    rows: Sequence[Mapping[str, Any]]

    def html(self) -> str:
        numeric = {key for key in self.rows[0] if all(isinstance(row[key], int | float | None) for row in self.rows)}
        head = "".join(f"<th{_class(key in numeric)}>{escape(key)}</th>" for key in self.rows[0])
        body = "\n".join(self._row(row, numeric) for row in self.rows)
        return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'

    @staticmethod
    def _row(row: Mapping[str, Any], numeric: set[str]) -> str:
        cells = (f"<td{_class(key in numeric)}>{escape(_text(value))}</td>" for key, value in row.items())
        return f"<tr>{''.join(cells)}</tr>"


@dataclass(frozen=True)
class Notes(Block):
    """What the reader has to know before comparing."""

    texts: Sequence[str]

    def html(self) -> str:
        return "<ul>" + "\n".join(f"<li>{escape(text)}</li>" for text in self.texts) + "</ul>"


@dataclass(frozen=True)
class Folded(Block):
    """A block that the reader opens by its title."""

    title: str
    block: Block

    def html(self) -> str:
        return f"<details><summary>{escape(self.title)}</summary>\n{self.block.html()}\n</details>"


def write_report(result: Mapping[str, Any], previews: Sequence[Sequence[Image.Image]], folder: str | Path) -> Path:
    """Write ``report.html`` for the ``result`` of a benchmark.

    Args:
        previews: some images of every run.
    """
    runs, plan = result["runs"], result["benchmark"]
    notes = list(dict.fromkeys(note for run in runs for note in run["warnings"]))
    best = _best(runs)
    sections = [Section("Scores", [Table([score_row(run) for run in runs]), *([Paragraph(best)] if best else [])])]
    if len(runs) > 1:
        curves = Picture(
            _curves(runs),
            "Every score (upright) over the guidance scale.",
            "curves over the guidance scale",
            0.5,
        )
        sections.append(Section("Guidance", [curves]))
    if notes:
        sections.append(Section("Before you compare", [Notes(notes)]))
    sections.append(Section("Samples", [_grid(run, images) for run, images in zip(runs, previews)]))
    if "classes" in runs[0]:
        sections.append(Section("Classes", [Paragraph(CLASS_COLUMNS), *map(_classes, runs)]))
    sections.append(Section("How to repeat it", list(_repeat(result))))
    path = Path(folder) / REPORT_FILE
    write_page(
        path,
        title="Generation benchmark",
        kicker=f"protocol {result['protocol']}",
        lead=(
            f"{plan['num_images']:,} images per guidance scale, labels {plan['labels']}, seed {plan['seed']}, "
            f"against {runs[0]['reference']['source']}."
        ),
        sections=sections,
    )
    return path


def score_row(run: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a run in the table of scores."""
    scores = {name: value for name, value in run["scores"].items() if not name.endswith("_std")}
    return {"guidance": scale_text(run)} | scores | {"distinct": run["images"]["distinct"]}


def scale_text(run: Mapping[str, Any]) -> str:
    """The guidance scale of a run."""
    scale = run["guidance_scale"]
    if scale is None:
        return "none"
    return " to ".join(f"{part:g}" for part in scale) if isinstance(scale, list | tuple) else f"{scale:g}"


def _best(runs: Sequence[Mapping[str, Any]]) -> str:
    name = next((name for name in LOWER_IS_BETTER if name in runs[0]["scores"]), None)
    if len(runs) < 2 or name is None:
        return ""
    best = min(runs, key=lambda run: run["scores"][name])
    return f"The lowest {name} is {best['scores'][name]:.4g}, at guidance {scale_text(best)}."


def _curves(runs: Sequence[Mapping[str, Any]]) -> Image.Image:
    """One small plot per score over the guidance scale, two image pixels per CSS pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ordered = sorted((run for run in runs if isinstance(run["guidance_scale"], int | float)), key=_scale)
    names = [name for name in runs[0]["scores"] if not name.endswith("_std")]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(7.2, 1.9 * rows), dpi=200, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for name, axis in zip(names, axes):
        axis.plot([_scale(run) for run in ordered], [run["scores"][name] for run in ordered], "o-", color="#2f5d9b")
        axis.set_title(name, loc="left", fontsize=8)
        axis.ticklabel_format(useOffset=False)
        axis.locator_params(nbins=5)
        axis.tick_params(labelsize=7)
        axis.grid(color="#eceef1")
    for axis in axes:  # what is left over
        axis.set_visible(False)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _scale(run: Mapping[str, Any]) -> float:
    return run["guidance_scale"]


def _grid(run: Mapping[str, Any], images: Sequence[Image.Image]) -> Picture:
    sheet = grid(images)
    scale = max(1, GRID_WIDTH // sheet.width) if sheet.width < GRID_WIDTH else GRID_WIDTH / sheet.width
    text = f"The first {len(images)} images, guidance {scale_text(run)}."
    return Picture(sheet, text, text, scale)


def _classes(run: Mapping[str, Any]) -> Folded:
    """Classes that miss the real images come first."""
    rows = sorted(run["classes"], key=lambda row: (row["precision"] is None, row["precision"], row["class"]))
    counts = [row["images"] for row in rows]
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    text = f"guidance {scale_text(run)}: {len(rows):,} classes of {each} images; the farthest from the real ones first"
    return Folded(text, Table(rows))


def _repeat(result: Mapping[str, Any]) -> Iterator[Block]:
    run = result["runs"][0]
    recorded = {"plan": result["benchmark"]} | {name: run[name] for name in ("reference", "settings", "versions")}
    return repeat_blocks(result, recorded, "images")


def repeat_blocks(result: Mapping[str, Any], recorded: Mapping[str, Any], what: str) -> Iterator[Block]:
    """The command, what it did, and all that the scores of ``what`` depend on."""
    if result["command"]:
        yield Commands([result["command"]])
    yield Paragraph(
        f"{_work(result, what)} Number i of a seed is the same in any number of processes, so the same command gives "
        "the same scores."
    )
    rows = [{"setting": name, "value": _text(value)} for name, value in _flatten(recorded)]
    yield Folded("Everything that these scores depend on", Table(rows))


def _work(result: Mapping[str, Any], what: str) -> str:
    if not result["generated"]:
        return "All features were there from earlier calls."
    processes = "one process" if result["processes"] == 1 else f"{result['processes']:,} processes"
    return f"This call generated {result['generated']:,} {what} in {result['seconds']:,.0f} s, in {processes}."


def _class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.4g}" if isinstance(value, float) else str(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
