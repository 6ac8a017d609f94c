"""``vistok probe`` and ``vistok compare``: evaluate tokenizers before a large generator is trained on them."""

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
from vistok.probing.networks import choose_network
from vistok.probing.report import write_comparison, write_probe
from vistok.probing.settings import ProbeSettings
from vistok.probing.tokenizer import code_usage, describe, feature_probes, reconstruction, speed
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.framewise import Framewise
from vistok.train.tasks.images import example_batch
from vistok.train.tokenize import tokenize
from vistok.utils.devices import choose_device
from vistok.utils.files import read_object, write_json
from vistok.utils.outputs import continued, unfinished

PICTURE = "reconstructions.png"
MEASURED = ("tokenizer", "data", "speed", "feature_probes", "settings", "versions")
"""Sections that each finished measurement has."""
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
    """Evaluate a tokenizer by itself and by a small generator on its tokens. A repeated call resumes.

    Args:
        run: a run, saved tokenizer, or hub id.
        out: folder for tokens, the generator's run, ``result.json``, ``report.html`` and a picture.
        overrides: ``data.key=value`` texts choose other images than the run's. With ``data.num_frames``, a tokenizer of
            images is evaluated on clips, frame by frame. ``text.key=value`` texts change the run's text settings, for a
            tokenizer that decodes with the images' texts.
        command: the equivalent command line, for the report.
        allowed: what the overrides may do.

    Returns:
        The contents of ``result.json``: ``tokenizer``, ``data``, ``reconstruction`` (scores, network, warnings),
        ``code_usage``, ``speed``, ``generator``, ``feature_probes``, ``seconds``, ``settings``, ``versions``.

    Raises:
        ResumeError: ``out`` belongs to other settings or another tokenizer.
        FolderInUseError: another process writes ``out``.
        ValueError, ConfigError, CheckpointError, ImageError: as data, tokenizers and networks.
    """
    out = Path(out)
    of_text = [item for item in overrides if item.startswith(TEXT_OVERRIDES)]
    others = [item for item in overrides if item not in of_text]
    tokenizer, data, held_out = _open(run, others, settings, device, allowed)
    settings = _with_network(settings, data)
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
    """Evaluate several tokenizers, of any kind, on the same images, and compare them.

    Args:
        runs: each as ``run`` of ``probe``. The data are those of the first run, changed by ``overrides``.
        settings: as in ``probe``; by default no small generator is trained.
        overrides: ``data.key=value`` texts, as in ``probe``. Texts are read as each run did.
        out, command, allowed: as in ``probe``; each tokenizer has its own folder below ``out``.

    Returns:
        The contents of ``result.json``: ``tokenizers`` (a result of ``probe`` for each), ``settings``, ``data``,
        ``versions``.

    Raises:
        ValueError: there are fewer than two tokenizers, one is given twice, or one reads images of another size.
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
    settings = _with_network(settings, data)
    texts = [text_of_run(run, tokenizer) for run, tokenizer in zip(runs, tokenizers, strict=True)]
    conditions = [conditions_of(*pair, held_out) for pair in zip(texts, tokenizers, strict=True)]
    names = _folders(runs)
    what: dict[str, Any] = {"tokenizers": [t.fingerprint() for t in tokenizers], "data": asdict(data)}
    if any(text is not None for text in texts):
        what["texts"] = [None if text is None else asdict(text) for text in texts]
    with continued(out, settings.plan(what)):
        results = []
        for run, name, tokenizer, given in zip(runs, names, tokenizers, conditions, strict=True):
            result = _judge(tokenizer, data, held_out, out / name, settings, given) | {"name": str(run)}
            save_result(result, out / name)
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
    """The tokenizer, the training data of the probes, and the held-out data."""
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


def _with_network(settings: ProbeSettings, data: DataConfig) -> ProbeSettings:
    """The settings with the default network of images or clips, if they name none."""
    return replace(settings, network=choose_network(settings.network, clips=data.num_frames is not None))


def _fitted(tokenizer: Tokenizer, data: DataConfig) -> Tokenizer:
    """The tokenizer; if it is one of images and the data are clips, wrapped to encode each frame by itself."""
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
    """All measurements of one tokenizer; finished ones, tokens and the generator's run in ``out`` are reused."""
    finished = out / "measured.json"
    if finished.exists():
        measured = read_object(finished)
        if absent := [name for name in MEASURED if not isinstance(measured.get(name), dict)]:
            raise ValueError(f"{finished} lacks {', '.join(absent)}; remove it to measure again")
        return measured
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
    """A picture of held-out originals over their reconstructions.

    For a tokenizer that decodes to embeddings, the nearest images of ``gallery`` replace the reconstructions. If it
    decodes to neither pixels nor embeddings, only the originals are shown.
    """
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
    """A folder name for each run; it begins with the run's number, so that names are unique."""
    return [f"{number}-{Path(run).name or 'tokenizer'}" for number, run in enumerate(runs, 1)]
