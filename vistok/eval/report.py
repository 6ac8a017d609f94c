"""The page of a benchmark: scores, the curve over guidance scales, samples, classes, and how to repeat it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.pictures import grid
from vistok.report import (
    code,
    definitions,
    details,
    figure,
    gallery,
    page,
    paragraph,
    section,
    table,
    warnings,
    write_page,
)

REPORT_FILE = "report.html"
LOWER_IS_BETTER = ("fid", "clean_fid", "fd_dinov2", "frechet_distance", "sfid", "kid", "kernel_distance", "clean_kid")
SMALL = 96  # images below this side are shown enlarged


def write_report(result: Mapping[str, Any], previews: Sequence[Sequence[Image.Image]], folder: str | Path) -> Path:
    """Write ``report.html`` for the ``result`` of a benchmark.

    Args:
        previews: some images of every run.
    """
    runs = result["runs"]
    plan = result["benchmark"]
    lead = (
        f"{plan['num_images']:,} images per guidance scale, labels {plan['labels']}, seed {plan['seed']}, "
        f"protocol {result['protocol']}, against {runs[0]['reference']['source']}"
    )
    notes = list(dict.fromkeys(note for run in runs for note in run["warnings"]))
    sections = [
        section("Scores", table([_score_row(run) for run in runs]), _best(runs)),
        *([section("Guidance", figure(_curves(runs), "scores over the guidance scale"))] if len(runs) > 1 else []),
        *([section("Read these before comparing", warnings(notes))] if notes else []),
        section("Samples", gallery(_grid(run, images) for run, images in zip(runs, previews))),
        section("Classes", *(_classes(run) for run in runs if "classes" in run)) if "classes" in runs[0] else "",
        section("How to repeat it", *_repeat(result)),
    ]
    path = Path(folder) / REPORT_FILE
    write_page(path, page("Generation benchmark", lead, sections))
    return path


def _key(run: Mapping[str, Any]) -> Any:
    scale = run["guidance_scale"]
    return tuple(scale) if isinstance(scale, list) else scale


def _scale_text(run: Mapping[str, Any]) -> str:
    scale = run["guidance_scale"]
    if scale is None:
        return "none"
    return " to ".join(f"{part:g}" for part in scale) if isinstance(scale, list | tuple) else f"{scale:g}"


def _score_row(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"guidance": _scale_text(run)} | run["scores"] | {"distinct images": run["images"]["distinct"]}


def _best(runs: Sequence[Mapping[str, Any]]) -> str:
    name = next((name for name in LOWER_IS_BETTER if name in runs[0]["scores"]), None)
    if len(runs) < 2 or name is None:
        return ""
    best = min(runs, key=lambda run: run["scores"][name])
    return paragraph(f"The lowest {name} is {best['scores'][name]:.4g}, at guidance {_scale_text(best)}.")


def _curves(runs: Sequence[Mapping[str, Any]]) -> Image.Image:
    """One small plot per score over the guidance scale."""
    from matplotlib.figure import Figure

    ordered = sorted((run for run in runs if not isinstance(_key(run), tuple)), key=_key)
    names = [name for name in ordered[0]["scores"] if not name.endswith("_std")] if ordered else []
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    plot = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
    axes = plot.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        axis.plot([_key(run) for run in ordered], [run["scores"][name] for run in ordered], "o-", color="#2a78d6")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


def _grid(run: Mapping[str, Any], images: Sequence[Image.Image]) -> str:
    scale = 2 if images[0].width < SMALL else 1
    return figure(grid(images), f"first {len(images)} images, guidance {_scale_text(run)}", scale=scale)


def _classes(run: Mapping[str, Any]) -> str:
    rows = sorted(run["classes"], key=lambda row: (row["precision"] is None, row["precision"], row["class"]))
    counts = [row["images"] for row in rows]
    text = f"guidance {_scale_text(run)}: {len(rows):,} classes, {min(counts):,} to {max(counts):,} images each"
    return details(text, table(rows))


def _repeat(result: Mapping[str, Any]) -> list[str]:
    run = result["runs"][0]
    recorded = {
        "plan": result["benchmark"],
        "reference": run["reference"],
        "settings": run["settings"],
        "versions": run["versions"],
    }
    made = f"This call generated {result['generated']:,} images in {result['seconds']:,.0f} s"
    return [
        *([code(result["command"])] if result["command"] else []),
        paragraph(f"{made}, in {result['processes']} process(es). Image i of a seed is the same in every one."),
        details("everything that these scores depend on", definitions(recorded)),
    ]
