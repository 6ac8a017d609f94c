"""The report of a training run: pictures by step, curves with a reference, the codebook, and the next commands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vistok.checkpoints import WEIGHTS
from vistok.config import load_config
from vistok.data.opening import open_source
from vistok.pipelines.folders import GENERATOR, TOKENIZER, load_tokenizer
from vistok.pipelines.runs import RUN_CONFIG, data_of_run
from vistok.signatures import ConfigError
from vistok.tokenizers.base import Tokenizer
from vistok.train.atlas import codebook_atlas
from vistok.train.curves import reference_curve
from vistok.train.monitor import METRICS_FILE, last_seconds, read_metrics
from vistok.train.tasks.images import example_batch
from vistok.utils.files import missing_folder, read_object
from vistok.utils.report import (
    REPORT_FILE,
    Block,
    Chart,
    Charts,
    Commands,
    Facts,
    Folded,
    Line,
    Paragraph,
    Picture,
    Section,
    Slider,
    Table,
    write_report,
)
from vistok.utils.tensors import opened

PICTURES = 24
"""The most pictures in the slider; if there are more, evenly spread ones are shown."""
PICTURE_WIDTH = 690
"""The largest width of a picture in CSS pixels."""
FIRST = ("loss", "psnr", "accuracy", "codebook_usage", "perplexity", "grad_norm")
"""Metrics whose curves come first."""
TITLES = {
    "psnr": "PSNR in dB",
    "codebook_usage": "share of codes in use",
    "perplexity": "perplexity of the codes",
    "grad_norm": "norm of the gradients",
    "lr": "learning rate",
}
HELD_OUT = "val_"
PIXELS, MOST_EXAMPLES, FEWEST_EXAMPLES = 1 << 20, 256, 32
"""The images for the codebook atlas have about ``PIXELS`` pixels in total; their number lies between these bounds."""

Examples = Callable[[int], Tensor]
"""From n to n images of the run's data, evenly spread, (n, C, H, W) in [-1, 1]."""


def write_run_report(folder: str | Path, *, examples: Examples | None = None) -> Path:
    """Write ``report.html`` into a run folder, from the files in it, and return its path.

    Args:
        examples: gives images for the codebook atlas of a tokenizer; by default they are read as the run's config says,
            and the atlas is left out if they are no longer there.

    Raises:
        FileNotFoundError: ``folder`` is not a run, or has logged no step yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(missing_folder(folder))
    for name in (RUN_CONFIG, METRICS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no training run with steps: it has no {name}")
    config, rows = load_config(folder / RUN_CONFIG), read_metrics(folder / METRICS_FILE)
    _check(config, folder / RUN_CONFIG)
    if not rows:
        raise FileNotFoundError(f"{folder} has logged no step yet: {METRICS_FILE} is empty")
    facts = read_object(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    kind = GENERATOR if (folder / GENERATOR).is_dir() else TOKENIZER
    sections = [
        *_pictures(folder),
        Section("Curves", list(_curves(rows, config.get("curve")))),
        *(_codebook(folder, examples) if kind == TOKENIZER else ()),
        Section("Speed", [Facts(_speed(rows))]),
        Section("Go on", [Commands(_commands(folder, kind))]),
        Section("What was trained", list(_config(config, facts))),
    ]
    write_report(
        folder / REPORT_FILE,
        title=folder.absolute().name
        if folder.absolute().name != kind
        else f"{kind} of {folder.absolute().parent.name}",
        kicker=f"vistok train, {folder}",
        lead=_lead(folder, config, rows, facts, kind),
        sections=sections,
    )
    return folder / REPORT_FILE


def _check(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless a config has what the page says of it."""
    model, training, curve = (config.get(key) for key in ("model", "training", "curve"))
    name = model.get("name") if isinstance(model, Mapping) else None
    steps = training.get("max_steps") if isinstance(training, Mapping) else None
    if not isinstance(name, str) or type(steps) is not int or not (curve is None or isinstance(curve, str)):
        raise ValueError(
            f"{path} is no config of a training run: model.name (got {name!r}) and curve (got {curve!r}) are texts, "
            f"training.max_steps (got {steps!r}) is an integer"
        )


def _lead(
    folder: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], kind: str
) -> str:
    step, last = rows[-1]["step"], config["training"]["max_steps"]
    size = f" of {_weights(folder / kind):,} weights" if (folder / kind / WEIGHTS).is_file() else ""
    end = "" if step >= last else ": it was stopped, and goes on with --resume"
    device = f" on {facts['device']}" if facts.get("device") else ""
    return (
        f"A {kind}, {config['model']['name']}{size}, after {step:,} of {last:,} steps in "
        f"{_duration(last_seconds(rows))}{device}{end}."
    )


def _weights(folder: Path) -> int:
    """The number of weights of a saved model."""
    with opened(folder / WEIGHTS) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


def _pictures(folder: Path) -> Iterator[Section]:
    files = sorted((folder / "images").glob("step-*.png"))
    if not files:
        return
    stride = (len(files) - 1) / max(1, PICTURES - 1)
    chosen = files if len(files) <= PICTURES else [files[round(index * stride)] for index in range(PICTURES)]
    pictures = []
    for file in chosen:
        with Image.open(file) as image:
            image.load()
        step = int(file.stem.removeprefix("step-"))
        scale = PICTURE_WIDTH / image.width
        scale = math.floor(scale) if scale >= 1 else scale
        pictures.append(Picture(image, f"step {step:,}", f"what the model made at step {step:,}", min(scale, 3)))
    shown = "All" if len(chosen) == len(files) else f"{len(chosen)} of {len(files):,}, evenly spread,"
    text = f"Drag to go through the steps. {shown} pictures that the run made lie in images/."
    yield Section("Pictures by step", [Slider(pictures, text)])


def _curves(rows: Sequence[Mapping[str, Any]], curve: str | None) -> Iterator[Block]:
    """The charts of all metrics: first the main ones, then the others, folded."""
    reference, absent = [], None
    if curve is not None:
        try:
            reference = reference_curve(curve)
        except ConfigError as error:
            absent = str(error)
    names = list(dict.fromkeys(name for row in rows for name in row))
    own = [name for name in names if not name.startswith(HELD_OUT) and name not in ("step", "seconds")]
    unit = next((name for name in own if name.endswith("_per_second")), None)
    first = [name for name in (*FIRST, unit) if name in own]
    held_out = any(name.startswith(HELD_OUT) for name in names)
    legend = [("own", "this run, training")] + [("second", "held-out")] * held_out
    legend += [("reference", f"reference: {curve}")] * bool(reference)
    shown = [chart for name in first if (chart := _chart(name, rows, reference)) is not None]
    if absent is not None:
        yield Paragraph(absent)
    yield Charts(shown, "From metrics.jsonl. TensorBoard shows more: tensorboard --logdir with the run folder.", legend)
    others = [chart for name in own if name not in first and (chart := _chart(name, rows, reference)) is not None]
    if others:
        yield Folded(f"{len(others)} more curve{'s' * (len(others) > 1)}", Charts(others, "", legend))


def _chart(name: str, rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Chart | None:
    lines = [
        Line.of(rows, name),
        Line.of(rows, f"{HELD_OUT}{name}", style="second"),
        # Speeds of another machine do not apply to this run.
        Line.of([] if name.endswith("_per_second") else reference, name, style="reference"),
    ]
    lines = [line for line in lines if line.runs]
    return Chart(TITLES.get(name, name.replace("_", " ")), lines) if lines else None


def _codebook(folder: Path, examples: Examples | None) -> Iterator[Section]:
    if not (folder / TOKENIZER).is_dir():
        return
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if not tokenizer.spec.discrete:
        return
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = tokenizer.to(device).eval()
    try:
        pixels = (examples or _examples_of(folder, tokenizer))(example_count(tokenizer.input_shape))
    except (ValueError, OSError) as error:
        text = f"The images that this run trained on cannot be read now, so its codes are not shown: {error}"
        yield Section("Codebook", [Paragraph(text)])
        return
    atlas = codebook_atlas(tokenizer, pixels)
    size, tokens = len(atlas.counts), int(atlas.counts.sum())
    blocks: list[Block] = [
        Facts(
            {
                "Codes": f"{size:,}",
                "In use": f"{size - atlas.dead:,} ({1 - atlas.dead / size:.1%}) by {tokens:,} tokens of "
                f"{atlas.images:,} images of the run's data; evenly spread tokens would use {atlas.possible:.1%}",
                "Never chosen": f"{atlas.dead:,}" + (" (dead, or rare)" if atlas.dead else ""),
                "Perplexity": f"{atlas.perplexity:,.1f}: as many codes, chosen equally often, would be as varied",
            }
        )
    ]
    if size > 1:
        ordered = atlas.counts.sort(descending=True).values.tolist()
        points = [(rank + 1, count / max(sum(ordered), 1)) for rank, count in enumerate(ordered) if count]
        blocks.append(Charts([Chart("share of tokens by rank of the code", [Line(points)], "rank")]))
    if atlas.picture is not None:
        text = (
            "An atlas of the most frequent codes, with how many tokens have each: what the images look like there, the "
            "nearest to the code first. Each patch is twice as wide as the token's own part of the image."
        )
        blocks.append(Picture(atlas.picture, text, "patches of images, a row for each code"))
    yield Section("Codebook", blocks)


def example_count(shape: Sequence[int]) -> int:
    """The number of images or clips of shape (C, [T,] H, W) for the codebook atlas."""
    return min(MOST_EXAMPLES, max(FEWEST_EXAMPLES, PIXELS // math.prod(shape[1:])))


def _examples_of(folder: Path, tokenizer: Tokenizer) -> Examples:
    data = data_of_run(folder, (), input_shape=tokenizer.input_shape)
    return lambda count: example_batch(open_source(data), data, count).pixels


def _speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    unit = next((name for name in rows[-1] if name.endswith("_per_second")), None)
    seconds = last_seconds(rows)
    found = {"Training time": _duration(seconds)}
    speeds = sorted(row[unit] for row in rows if row.get(unit)) if unit is not None else []
    if unit is not None and speeds:
        what = unit.removesuffix("_per_second").replace("_", " ")
        found["Throughput"] = f"{speeds[len(speeds) // 2]:,.0f} {what} per second (median), {speeds[-1]:,.0f} at best"
    if seconds is not None:
        found["Per step"] = f"{1000 * seconds / max(rows[-1]['step'], 1):,.1f} ms"
    return found


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def _commands(folder: Path, kind: str) -> list[str]:
    run = quote(str(folder))
    if kind == TOKENIZER:
        return [
            "# What the tokenizer keeps of a picture of yours",
            f"vistok reconstruct {run} photo.jpg",
            "",
            "# Its scores on the test split",
            f"vistok eval {run}",
            "",
            "# Tokens for a generator",
            f"vistok tokenize {run} --out tokens/",
        ]
    return [
        "# Pictures",
        f"vistok sample {run} --num 64 --out samples/",
        "",
        "# Scores at several guidance scales",
        f"vistok benchmark {run} --reference photos/ --guidance-sweep 1.0,1.5,2.0 --out benchmark/",
        "",
        "# Try it in a browser",
        f"vistok demo {run}",
    ]


def _config(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Block]:
    if facts:
        shown = {name.replace("_", " "): str(value) for name, value in facts.items() if name != "command"}
        command = {"command": " ".join(map(quote, facts["command"]))} if facts.get("command") else {}
        yield Facts(command | shown)
    rows = [{"key": key, "value": value} for key, value in _flatten(config)]
    yield Folded("The config (config.yaml)", Table(rows))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of a dotted name and a text for all nested values."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
