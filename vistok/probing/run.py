"""``vistok probe`` and ``vistok compare``: tokenizers judged before any large generator is trained on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vistok.config import NOTHING, Allowed
from vistok.data.config import DataConfig
from vistok.data.movies import compared
from vistok.data.opening import open_source
from vistok.data.pictures import grid, save_png, to_pil
from vistok.data.tokens import TokenCache
from vistok.eval.record import library_versions, save_result
from vistok.eval.retrieval import Gallery
from vistok.eval.tokenizers import BatchConditions
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.runs import data_of_run
from vistok.pipelines.texts import TEXT_OVERRIDES, conditions_of, text_of_run
from vistok.probing.generator import probe_generator
from vistok.probing.report import write_comparison, write_probe
from vistok.probing.settings import ProbeSettings
from vistok.probing.tokenizer import code_usage, describe, feature_probes, reconstruction, speed
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.framewise import Framewise
from vistok.train.tasks.images import example_batch
from vistok.train.tokenize import tokenize
from vistok.utils.devices import choose_device
from vistok.utils.files import read_json, write_json
from vistok.utils.outputs import continued, unfinished

PICTURE = "reconstructions.png"
SHOWN = 8


def probe(
    run: str,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    settings: ProbeSettings = ProbeSettings(),  # noqa: B008 (immutable)
    device: str | None = None,
    command: str | None = None,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Judge a tokenizer by itself and by a small generator on its tokens; called again, it goes on where it stopped.

    Args:
        run: a run, saved tokenizer, or hub id.
        out: folder for tokens, the generator's run, ``result.json``, ``report.html`` and a picture.
        overrides: ``data.key=value`` texts: other images than the run's. With ``data.num_frames`` a tokenizer of images
            is judged on clips, frame by frame. A tokenizer that decodes with texts reads those of the images, as its
            run did, or as ``text.key=value`` texts change that.
        command: the command line that this call stands for, for the report.
        allowed: what the overrides may do.

    Returns:
        what ``result.json`` holds: ``tokenizer``, ``data``, ``reconstruction`` (scores, network, warnings),
        ``code_usage``, ``speed``, ``generator``, ``feature_probes``, ``seconds``, ``settings``, ``versions``.

    Raises:
        ResumeError: ``out`` holds something else.
        FolderInUseError: another process writes ``out``.
        ValueError, ConfigError, CheckpointError, ImageError: as data, tokenizers and networks.
    """
    out = Path(out)
    of_text = [item for item in overrides if item.startswith(TEXT_OVERRIDES)]
    others = [item for item in overrides if item not in of_text]
    tokenizer, data, held_out = _open(run, others, settings, device, allowed)
    text = text_of_run(run, tokenizer, of_text, allowed=allowed)
    conditions = conditions_of(text, tokenizer, held_out)
    what = {"tokenizer": tokenizer.fingerprint(), "data": asdict(data)}
    what |= {} if text is None else {"text": asdict(text)}
    with continued(out, settings.plan(what)):
        result = _judge(tokenizer, data, held_out, out, settings, conditions)
        result |= {"name": str(run), "command": command}
        save_result(result, out)
        write_probe(result, _picture(out), out)
    return result


def compare(
    runs: Sequence[str],
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    settings: ProbeSettings = ProbeSettings(steps=0),  # noqa: B008 (immutable)
    device: str | None = None,
    command: str | None = None,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Judge several tokenizers, of any families, on the same images, and set them side by side.

    Args:
        runs: as ``run`` of ``probe``. The first one's data are taken, as overrides change them.
        settings: with steps, every tokenizer is probed with a small generator, too.
        out, overrides, command, allowed: as in ``probe``; a folder below ``out`` for each tokenizer.

    Returns:
        what ``result.json`` holds: ``tokenizers``, a result of ``probe`` each; ``settings``, ``data``, ``versions``.

    Raises:
        ValueError: fewer than two tokenizers, one twice, or one that reads images of another size.
    """
    out = Path(out)
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise ValueError(
            f"a comparison needs at least two different tokenizers, got {', '.join(map(str, runs)) or 'none'}"
        )
    first, data, held_out = _open(runs[0], overrides, settings, device, allowed)
    others = [_fitted(load_tokenizer(run), data).to(first.device) for run in runs[1:]]
    for run, tokenizer in zip(runs[1:], others):
        _check_same(tokenizer, data, str(run), str(runs[0]))
    tokenizers = [first, *others]
    texts = [conditions_of(text_of_run(run, part), part, held_out) for run, part in zip(runs, tokenizers, strict=True)]
    names = _folders(runs)
    what = {"tokenizers": [t.fingerprint() for t in tokenizers], "data": asdict(data)}
    with continued(out, settings.plan(what)):
        results = []
        for run, name, tokenizer, conditions in zip(runs, names, tokenizers, texts, strict=True):
            result = _judge(tokenizer, data, held_out, out / name, settings, conditions) | {"name": str(run)}
            write_json(out / name / "result.json", result)
            results.append(result)
        whole = {
            "tokenizers": results,
            "data": asdict(held_out),
            "settings": asdict(settings),
            "versions": library_versions(),
            "command": command,
        }
        save_result(whole, out)
        write_comparison(whole, [_picture(out / name) for name in names], out)
    return whole


def _open(
    run: str, overrides: Sequence[str], settings: ProbeSettings, device: str | None, allowed: Allowed
) -> tuple[Tokenizer, DataConfig, DataConfig]:
    """The tokenizer, the data that are fitted to, and those that are scored on."""
    tokenizer = load_tokenizer(run).to(choose_device(device)).eval()
    parts = [
        replace(
            data_of_run(run, overrides, input_shape=tokenizer.input_shape, split=split, allowed=allowed),
            limit=limit,
            flip=False,
            affine=None,
        )
        for split, limit in (
            (settings.train_split, settings.train_images),
            (settings.test_split, settings.test_images),
        )
    ]
    if parts[0].split == parts[1].split:
        raise ValueError(
            f"data.split={parts[0].split} would make the probe score what it was fitted to; leave it out, and say "
            "--train-split and --test-split"
        )
    return _fitted(tokenizer, parts[0]), parts[0], parts[1]


def _fitted(tokenizer: Tokenizer, data: DataConfig) -> Tokenizer:
    """A tokenizer of images, for clips: each frame by itself."""
    if data.num_frames is not None and len(tokenizer.input_shape) == 3:
        return Framewise.of(tokenizer, data.num_frames)
    return tokenizer


def _check_same(tokenizer: Tokenizer, data: DataConfig, name: str, first: str) -> None:
    try:
        tokenizer.spec_for(data.input_shape)
    except ValueError as error:
        raise ValueError(f"{name} cannot be compared with {first} on images {data.input_shape}: {error}") from error


def _judge(
    tokenizer: Tokenizer,
    data: DataConfig,
    held_out: DataConfig,
    out: Path,
    settings: ProbeSettings,
    conditions: BatchConditions | None,
) -> dict[str, Any]:
    """All that is measured of one tokenizer; tokens and the generator's run stay in ``out``, and are gone on from."""
    finished = out / "measured.json"
    if finished.exists():
        return read_json(finished)
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.spec_for(data.input_shape)
    caches = [_cache(tokenizer, part, out / name) for name, part in (("train", data), ("test", held_out))]
    result: dict[str, Any] = {
        "tokenizer": describe(tokenizer, data),
        "data": {"train": asdict(data), "test": asdict(held_out), "train_images": len(caches[0])},
        "reconstruction": reconstruction(tokenizer, held_out, settings, conditions),
        "code_usage": code_usage(caches[1]),
        "speed": speed(tokenizer, held_out),
        "feature_probes": feature_probes(tokenizer, caches[0], caches[1], data, held_out),
        "generator": None,
    }
    result["data"]["test_images"] = len(caches[1])
    save_png(_draw(tokenizer, data, held_out, conditions), out / PICTURE)
    if settings.steps:
        result["generator"] = probe_generator(caches[0].folder, caches[1].folder, out / "generator", settings)
    result |= {"settings": asdict(settings), "versions": library_versions()}
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_json(finished, result)
    return result


def _cache(tokenizer: Tokenizer, data: DataConfig, folder: Path) -> TokenCache:
    if folder.exists():
        cache = TokenCache(folder)
        cache.check_tokenizer(tokenizer.fingerprint())
        return cache
    return tokenize(tokenizer, data, folder, resume=unfinished(folder).exists())


@torch.no_grad()
def _draw(
    tokenizer: Tokenizer, gallery: DataConfig, data: DataConfig, conditions: BatchConditions | None
) -> Image.Image:
    """Held-out originals over reconstructions. What is no image is shown as the nearest one of the gallery's, or, where
    there are no embeddings either, not at all."""
    batch = example_batch(open_source(data), data, SHOWN)
    examples = batch.pixels
    pixels = examples.to(tokenizer.device, tokenizer.dtype)
    if tokenizer.renders:
        condition = None if conditions is None else conditions(batch).to(tokenizer.device)
        return compared(examples, tokenizer.reconstruct(pixels, condition=condition).float().cpu())
    if tokenizer.embeds:
        return compared(examples, Gallery(tokenizer, gallery)(tokenizer.decode_features(tokenizer.encode(pixels))))
    return grid(to_pil(examples))


def _picture(folder: Path) -> Image.Image:
    return Image.open(folder / PICTURE).convert("RGB")


def _folders(runs: Sequence[str]) -> list[str]:
    """A folder name for each, which begins with its number, so that it is its own."""
    return [f"{number}-{Path(run).name or 'tokenizer'}" for number, run in enumerate(runs, 1)]
