"""The report page of a benchmark: scores over guidance and temperature, samples, classes, how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.sheets import sheet
from vistok.utils.report import (
    REPORT_FILE,
    Block,
    Chart,
    Charts,
    Commands,
    Folded,
    Line,
    Notes,
    Paragraph,
    Picture,
    Section,
    Table,
    cell_text,
)
from vistok.utils.report import write_report as write_page
from vistok.utils.report.charts import Style

LOWER_IS_BETTER = (
    "fid",
    "fvd",
    "rfid",
    "rfvd",
    "clean_fid",
    "fd_dinov2",
    "frechet_distance",
    "sfid",
    "kid",
    "kernel_distance",
    "clean_kid",
)
COLUMNS = 16
"""Most classes that get a column each."""
GRID_WIDTH = 690
"""Largest width of a grid of samples, in CSS pixels."""
STYLES: tuple[Style, ...] = ("own", "second", "reference")
CLASS_COLUMNS = (
    "Diversity is the spread of a class's features as a share of that of all images: near 0, it repeats one image. "
    "Precision is the share of its images within the manifold of the reference."
)


def write_report(result: Mapping[str, Any], previews: Sequence[Sequence[Image.Image]], folder: str | Path) -> Path:
    """Write ``report.html`` for the ``result`` of a benchmark.

    Args:
        previews: some images for every run.
    """
    runs, plan = result["runs"], result["benchmark"]
    notes = list(dict.fromkeys(note for run in runs for note in run["warnings"]))
    found = [Paragraph(f"The search ended at guidance {result['found']:g}.")] if "found" in result else []
    sections = [Section("Scores", [*score_blocks(runs), *found])]
    if len(runs) > 1:
        sections += sweep_sections(runs)
    if notes:
        sections.append(Section("Before you compare", [Notes(notes)]))
    sections.append(Section("Samples", [_grid(run, images, plan["labels"]) for run, images in zip(runs, previews)]))
    if "classes" in runs[0]:
        sections.append(Section("Classes", [Paragraph(CLASS_COLUMNS), *map(_classes, runs)]))
    sections.append(Section("How to repeat it", list(_repeat(result))))
    path = Path(folder) / REPORT_FILE
    write_page(
        path,
        title="Generation benchmark",
        kicker=f"protocol {result['protocol']}",
        lead=(
            f"{plan['num_images']:,} images per setting, labels {plan['labels']}, seed {plan['seed']}, "
            f"against {runs[0]['reference']['source']}."
        ),
        sections=sections,
    )
    return path


def score_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each run: its setting and its scores."""
    swept = [name for name in ("guidance", "temperature") if name == "guidance" or _differ(runs, name)]
    rows = []
    for run in runs:
        temperature = run.get("temperature")
        setting = {"guidance": _scale_text(run), "temperature": "" if temperature is None else f"{temperature:g}"}
        scores = {name: value for name, value in run["scores"].items() if not name.endswith("_std")}
        rows.append({name: setting[name] for name in swept} | scores | {"distinct": run["images"]["distinct"]})
    return rows


def best_run(runs: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The index of the run with the lowest distance, and the name of that distance.

    None if there is only one run, or no distance.
    """
    name = next((name for name in LOWER_IS_BETTER if any(name in run["scores"] for run in runs)), None)
    scored = [index for index, run in enumerate(runs) if name is not None and run["scores"].get(name) is not None]
    if len(runs) < 2 or name is None or not scored:
        return None
    return min(scored, key=lambda index: runs[index]["scores"][name]), name


def score_blocks(runs: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    best = best_run(runs)
    marked: frozenset[tuple[int, str]] = frozenset() if best is None else frozenset({best})
    yield Table(score_rows(runs), marked)
    if best is not None:
        index, name = best
        value = runs[index]["scores"][name]
        yield Paragraph(f"The lowest {name} is {value:.4g}, at {setting_text(runs[index])}.")


def _differ(runs: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({run.get(name) for run in runs}) > 1


def sweep_sections(runs: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """Sections that show how the scores depend on guidance and temperature; none for fewer than two single scales."""
    runs = [run for run in runs if isinstance(run["guidance_scale"], int | float)]
    if len(runs) < 2:
        return
    if _differ(runs, "temperature") and _differ(runs, "guidance_scale"):
        yield Section("Guidance and temperature", [_matrix(runs)])
    temperatures = list(dict.fromkeys(run.get("temperature") for run in runs))
    axis = "guidance_scale" if _differ(runs, "guidance_scale") else "temperature"
    series = {"": runs}
    if axis == "guidance_scale" and len(temperatures) > 1:
        series = {f"temperature {t:g}": [run for run in runs if run.get("temperature") == t] for t in temperatures[:3]}
    names = [name for name in runs[0]["scores"] if not name.endswith("_std")]
    charts = [_over(axis, name, series) for name in names]
    legend = list(zip(STYLES, series)) if len(series) > 1 else []
    yield Section(f"Scores over the {axis.replace('_', ' ')}", [Charts(charts, "Every score, upright.", legend)])
    distance = next((name for name in LOWER_IS_BETTER if name in names), "")
    pairs = [
        pair for pair in ((distance, "is"), ("precision", "recall")) if all(name in runs[0]["scores"] for name in pair)
    ]
    if pairs:
        charts = [_against(*pair, series) for pair in pairs]
        text = "A point for each setting, named by its guidance scale where there is one curve."
        yield Section("What is traded for what", [Charts(charts, text, legend)])


def _matrix(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The distance of every guidance scale (rows) at every temperature (columns); without one, the first score."""
    best = best_run(runs)
    name = best[1] if best is not None else next(iter(runs[0]["scores"]))
    scales = sorted({_scale(run) for run in runs})
    temperatures = sorted({run["temperature"] for run in runs})
    values = {(_scale(run), run["temperature"]): run["scores"].get(name) for run in runs}
    head = f"{name}: guidance"
    rows = [
        {head: f"{scale:g}"} | {f"temperature {t:g}": values.get((scale, t)) for t in temperatures} for scale in scales
    ]
    marked: frozenset[tuple[int, str]] = frozenset()
    if best is not None:
        run = runs[best[0]]
        marked = frozenset({(scales.index(_scale(run)), f"temperature {run['temperature']:g}")})
    return Table(rows, marked)


def _over(axis: str, name: str, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    lines = []
    for style, (label, runs) in zip(STYLES, series.items()):
        points = sorted((run[axis], run["scores"][name]) for run in runs if run["scores"][name] is not None)
        lines.append(Line(points, label, style))
    return Chart(name, lines, axis.replace("_", " "), dots=True)


def _against(y: str, x: str, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    lines = []
    for style, (label, runs) in zip(STYLES, series.items()):
        whole = [run for run in runs if run["scores"][x] is not None and run["scores"][y] is not None]
        ordered = sorted(whole, key=_scale)
        names = [f"{_scale(run):g}" for run in ordered] if len(series) == 1 else ()
        lines.append(Line([(run["scores"][x], run["scores"][y]) for run in ordered], label, style, names))
    return Chart(f"{y} against {x}", lines, x, dots=True)


def _scale_text(run: Mapping[str, Any]) -> str:
    scale = run["guidance_scale"]
    if scale is None:
        return "none"
    return " to ".join(f"{part:g}" for part in scale) if isinstance(scale, list | tuple) else f"{scale:g}"


def setting_text(run: Mapping[str, Any]) -> str:
    """The setting of a run as text for the report."""
    temperature = run.get("temperature")
    return f"guidance {_scale_text(run)}" + ("" if temperature is None else f", temperature {temperature:g}")


def _scale(run: Mapping[str, Any]) -> float:
    return run["guidance_scale"]


def _grid(run: Mapping[str, Any], images: Sequence[Image.Image], labels: str) -> Picture:
    """A grid of samples. If there are few balanced classes, each gets a column under its name."""
    names = [row["name"] or str(row["class"]) for row in run.get("classes", ())]
    in_columns = labels == "balanced" and 1 < len(names) <= min(COLUMNS, len(images))
    if in_columns:
        images = images[: len(images) - len(images) % len(names)]
    drawn = sheet(images, len(names) if in_columns else None, column_labels=names if in_columns else ())
    text = f"The first {len(images)} images, {setting_text(run)}."
    return Picture(drawn, text, text, min(1.0, GRID_WIDTH / drawn.width))


def _classes(run: Mapping[str, Any]) -> Folded:
    """The table of classes, sorted by precision: those farthest from the real images come first."""
    rows = sorted(run["classes"], key=lambda row: (row["precision"] is None, row["precision"], row["class"]))
    counts = [row["images"] for row in rows]
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    text = f"{setting_text(run)}: {len(rows):,} classes of {each} images; the farthest from the real ones first"
    return Folded(text, Table(rows))


def _repeat(result: Mapping[str, Any]) -> Iterator[Block]:
    run = result["runs"][0]
    recorded = {"plan": result["benchmark"]} | {name: run[name] for name in ("reference", "settings", "versions")}
    return repeat_blocks(result, recorded, "images")


def repeat_blocks(result: Mapping[str, Any], recorded: Mapping[str, Any], what: str) -> Iterator[Block]:
    """The command, what it did, and everything that the scores depend on.

    Args:
        recorded: what the scores depend on.
        what: "images" or "clips".
    """
    if result["command"]:
        yield Commands([result["command"]])
    yield Paragraph(
        f"{_work(result, what)} Number i of a seed is the same in any number of processes, so the same command gives "
        "the same scores."
    )
    rows = [{"setting": name, "value": cell_text(value)} for name, value in _flatten(recorded)]
    yield Folded("Everything that these scores depend on", Table(rows))


def _work(result: Mapping[str, Any], what: str) -> str:
    if not result["generated"]:
        return "All features were there from earlier calls."
    processes = "one process" if result["processes"] == 1 else f"{result['processes']:,} processes"
    return f"This call generated {result['generated']:,} {what} in {result['seconds']:,.0f} s, in {processes}."


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
