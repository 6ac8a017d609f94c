"""Scores of tokenizers, generated ids and clips, and reference files, for `vistok eval` and `vistok benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vistok.config import NOTHING, Allowed
from vistok.data.config import DataConfig
from vistok.eval import make_reference
from vistok.eval.perturbation import evaluate_perturbation
from vistok.eval.protocols import choose_protocol, load_network
from vistok.eval.references import Provenance, open_reference
from vistok.eval.tokenizers import evaluate_tokenizer
from vistok.eval.video_protocols import RECONSTRUCTION, is_video_protocol
from vistok.losses import LPIPS
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.generation import Pipeline
from vistok.pipelines.runs import data_of_run
from vistok.pipelines.semantic import score_ids
from vistok.pipelines.texts import TEXT_OVERRIDES, conditions_of, text_of_run
from vistok.tokenizers.base import Tokenizer
from vistok.utils.devices import choose_device
from vistok.utils.processes import Processes

PAIRS, PERTURBATION = "reconstruction", "perturbation"


def score_tokenizer(
    run: str,
    overrides: Sequence[str],
    *,
    reference: str | None,
    protocol: str | None,
    weights: Path | None,
    torchscript: bool = False,
    lpips_weights: Path | None,
    batch_size: int,
    device: str | None,
    processes: Processes,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Score a tokenizer on the test split of its data, or on other images.

    Args:
        overrides: ``data.key=value`` texts; for a tokenizer that decodes with texts also ``text.key=value``.
        reference: folder or .zip of other images.
        torchscript: see ``load_clip_network``.
        allowed: what the overrides may do.
        protocol: None for PSNR and SSIM, with rFID if ``weights`` are given; "reconstruction" with rFID in any case;
            "perturbation" for pFID.

    Raises:
        ValueError: the protocol is not one for this tokenizer, or ``reference`` holds statistics instead of images.
    """
    if protocol not in (None, PAIRS, PERTURBATION) and not is_video_protocol(protocol):
        raise ValueError(f"a tokenizer is scored by the protocol {PAIRS} or {PERTURBATION}, not by {protocol!r}")
    if reference is not None:
        overrides = [f"data.root={_check_images(reference)}", *overrides]
    where = processes.device() if device is None else choose_device(device)
    tokenizer = load_tokenizer(run).to(where)
    of_text = [item for item in overrides if item.startswith(TEXT_OVERRIDES)]
    text = text_of_run(run, tokenizer, of_text, allowed=allowed)
    overrides = [f"data.batch_size={batch_size}", *(item for item in overrides if item not in of_text)]
    data = data_of_run(run, overrides, input_shape=tokenizer.input_shape, split="test", allowed=allowed)
    if len(tokenizer.input_shape) == 4:
        return _score_clip_tokenizer(tokenizer, data, protocol, weights, torchscript, lpips_weights, processes)
    if torchscript:
        raise ValueError(f"{run} is a tokenizer of images; TorchScript weights are of a network of clips")
    if is_video_protocol(protocol):
        raise ValueError(f"{run} is a tokenizer of images; the protocol {protocol} is of clips")
    network = None
    if protocol is not None or weights is not None:
        network = load_network(choose_protocol(PAIRS, None, None), weights=weights, device=where)
    given: dict[str, Any] = {"conditions": conditions_of(text, tokenizer, data), "processes": processes}
    if protocol == PERTURBATION and network is not None:
        result = evaluate_perturbation(tokenizer, data, network, **given)
    else:
        result = evaluate_tokenizer(tokenizer, data, network=network, lpips=open_lpips(lpips_weights), **given)
    if tokenizer.condition_spec.features is not None:
        result["tokenizer"]["text"] = None if text is None else asdict(text)
    return result


def score_generated_ids(
    run: str, overrides: Sequence[str], *, batch_size: int, device: str | None, allowed: Allowed = NOTHING
) -> dict[str, Any]:
    """Score a generator whose ids decode to image embeddings; see ``score_ids``.

    Args:
        overrides: ``data.key=value`` texts that name the images.
    """
    pipe = Pipeline.from_pretrained(run, device=device)
    overrides = [f"data.batch_size={batch_size}", *overrides]
    data = data_of_run(run, overrides, input_shape=pipe.tokenizer.input_shape, split="test", allowed=allowed)
    return score_ids(pipe, data)


def _score_clip_tokenizer(
    tokenizer: Tokenizer,
    data: DataConfig,
    protocol: str | None,
    weights: Path | None,
    torchscript: bool,
    lpips_weights: Path | None,
    processes: Processes,
) -> dict[str, Any]:
    """Score reconstructions of clips; given a video protocol or I3D weights, also by their Frechet video distance."""
    from vistok.eval.clips import evaluate_clip_tokenizer, load_clip_network

    if protocol == PERTURBATION:
        raise ValueError("the protocol perturbation is of images; clips are scored by protocols of clips")
    where, by_name = tokenizer.device, protocol is not None and is_video_protocol(protocol)
    scored = by_name or weights is not None or torchscript
    network = load_clip_network(weights, torchscript=torchscript, device=where) if scored else None
    lpips = open_lpips(lpips_weights)
    return evaluate_clip_tokenizer(
        tokenizer,
        data,
        protocol=protocol if by_name and protocol is not None else RECONSTRUCTION,
        network=network,
        lpips=None if lpips is None else lpips.to(where),
        processes=processes,
    )


def score_clips(
    generated: str,
    reference: str,
    *,
    protocol: str,
    weights: Path | None,
    torchscript: bool = False,
    batch_size: int,
    device: str | None,
    processes: Processes,
) -> dict[str, Any]:
    """The Frechet video distance of two folders of clips, list files, or files of statistics."""
    from vistok.eval.clips import STATISTICS, evaluate_clips, load_clip_network

    where = processes.device() if device is None else choose_device(device)
    stored = all(Path(side).suffix == STATISTICS for side in (generated, reference))
    network = None if stored else load_clip_network(weights, torchscript=torchscript, device=where)
    return evaluate_clips(
        generated, reference, protocol=protocol, network=network, batch_size=batch_size, processes=processes
    )


def measure_clips(
    pipe: Pipeline,
    out: Path,
    *,
    reference: str | None,
    weights: Path | None,
    torchscript: bool = False,
    device: str | None,
    processes: Processes,
    **options: Any,
) -> dict[str, Any]:
    """Generate clips and score them; ``options`` are those of ``benchmark_clips``."""
    from vistok.eval.clip_benchmark import benchmark_clips
    from vistok.eval.clips import load_clip_network

    if reference is None:
        raise ValueError("clips are scored against real ones: name a folder, a list, or statistics with --reference")
    where = processes.device() if device is None else choose_device(device)
    network = load_clip_network(weights, torchscript=torchscript, device=where)
    return benchmark_clips(pipe, out, reference=reference, network=network, processes=processes, **options)


def make_reference_file(
    images: str,
    path: Path,
    *,
    protocol: str,
    weights: Path | None,
    split: str | None,
    crop: int | None,
    batch_size: int,
    device: str | None,
    processes: Processes,
) -> Provenance:
    """Make a reference for a protocol; returns the file's provenance."""
    where = processes.device() if device is None else choose_device(device)
    rules = choose_protocol(protocol, None, None)
    network = load_network(rules, weights=weights, device=where)
    options: dict[str, Any] = {"split": split, "crop": crop, "reading": rules.reading, "batch_size": batch_size}
    made = make_reference(images, path, network, **options, processes=processes)
    return made.provenance


def open_lpips(weights: Path | None) -> LPIPS | None:
    return LPIPS.from_pretrained(weights) if weights is not None else None


def _check_images(reference: str) -> str:
    """Return ``reference`` unless it is a file of statistics; then raise ValueError, since images are needed."""
    if Path(reference).suffix != ".npz":
        return reference
    open_reference(reference).check_held_out()
    raise ValueError(f"a tokenizer is scored on image files, not on {reference}; name their folder or .zip")
