"""The report pages of a probe and of a comparison, and their table rows, which the command line also prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.utils.report import REPORT_FILE, Commands, Notes, Paragraph, Picture, Section, Table, write_report

SCORES = (
    "psnr",
    "psnr_frames",
    "ssim",
    "ssim_frames",
    "lpips",
    "lpips_frames",
    "rfid",
    "rfvd",
    "frechet_distance",
    "cosine",
    "class_recall",
)
CAPTION = "Held-out originals over reconstructions; over the nearest training image of a tokenizer that renders none."
WHAT = (
    "loss/token and loss/image: of a small generator on held-out tokens, trained for the steps of this page; losses of "
    "ids and of latents are no common measure. probe of generator: a linear classifier on its middle block, fed "
    "without a class. probe of tokens: the same on code vectors or latents, place by place. Distances carry the name "
    "of their network."
)


def row(result: Mapping[str, Any]) -> dict[str, Any]:
    """The table row of one tokenizer; what was not measured is None."""
    tokenizer, spec = result["tokenizer"], result["tokenizer"]["spec"]
    scored = result["reconstruction"] or {"scores": {}}
    usage, speed = result["code_usage"] or {}, result["speed"]
    generator, probes = result["generator"] or {}, result["feature_probes"]
    columns: dict[str, Any] = {
        "tokenizer": result["name"],
        "model": tokenizer["model"],
        "parameters": tokenizer["parameters"],
        "tokens": spec["length"] * spec["depth"],
        "codes": spec["codebook_size"],
        "bits/image": tokenizer["bits_per_image"],
    }
    for name in SCORES:
        if name in scored["scores"]:
            columns[name] = scored["scores"][name]
    if "network" in scored:
        columns["distance by"] = scored["network"]["name"]
    columns |= {"codes used": usage.get("used"), "bits/token": usage.get("bits_per_token")}
    columns |= {
        "loss/token": generator.get("loss_per_token"),
        "loss/image": generator.get("loss_per_image"),
        "probe of generator": generator.get("probe", {}).get("accuracy"),
    }
    columns |= {f"probe of {name}": found["accuracy"] for name, found in probes.items()}
    return columns | {"encode/s": speed["encode"], "decode/s": speed.get("decode")}


def table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of several tokenizers, with a column for everything that was measured of at least one of them."""
    rows = [row(result) for result in results]
    names = list(dict.fromkeys(name for one in rows for name in one))
    kept = [name for name in names if any(one.get(name) is not None for one in rows)]
    return [{name: one.get(name) for name in kept} for one in rows]


def warnings_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings that a reader needs before comparing the tokenizers."""
    found = []
    for result in results:
        found += (result["reconstruction"] or {}).get("warnings", [])
        if "refused" in (result["generator"] or {}):
            found.append(f"{result['name']}: {result['generator']['refused']}")
    losses = ((result["generator"] or {}).get("loss") for result in results)
    kinds = {loss for loss in losses if loss is not None}
    if len(kinds) > 1:
        found.append("losses of ids and of latents are no common measure: " + "; ".join(sorted(kinds)))
    return list(dict.fromkeys(found))


def write_probe(result: Mapping[str, Any], picture: Image.Image, folder: Path) -> Path:
    """Write the report page of one tokenizer."""
    values = [{"measure": name, "value": value} for name, value in row(result).items() if value is not None]
    return _write(folder, [result], [picture], Table(values), f"Probe of {result['name']}", result)


def write_comparison(result: Mapping[str, Any], pictures: Sequence[Image.Image], folder: Path) -> Path:
    """Write the report page that compares several tokenizers."""
    results = result["tokenizers"]
    return _write(folder, results, pictures, Table(table(results)), "Tokenizers side by side", result)


def _write(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    pictures: Sequence[Image.Image],
    scores: Table,
    title: str,
    whole: Mapping[str, Any],
) -> Path:
    shown = [
        Picture(picture, f"{result['name']}. {CAPTION}", CAPTION, max(1, 500 // picture.width))
        for result, picture in zip(results, pictures)
    ]
    sections = [Section("Scores", [scores, Paragraph(WHAT)])]
    if notes := warnings_of(results):
        sections.append(Section("Before you compare", [Notes(notes)]))
    sections.append(Section("Reconstructions", shown))
    if whole["command"]:
        sections.append(Section("How to repeat it", [Commands([whole["command"]])]))
    data, settings = results[0]["data"], whole["settings"]
    path = folder / REPORT_FILE
    write_report(
        path,
        title=title,
        kicker=f"{settings['steps']:,} steps of a small generator" if settings["steps"] else "without a generator",
        lead=(
            f"Fitted to {data['train_images']:,} and scored on {data['test_images']:,} images of "
            f"{data['test']['name'] or data['test']['root'] or data['test']['source']}."
        ),
        sections=sections,
    )
    return path
