"""Folders of samples and pictures of reconstructions, as the command line writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vistok._version import __version__
from vistok.classes import ClassLabel
from vistok.data.pictures import comparison, from_pil, grid, npz_writer, open_picture, save_png, to_uint8
from vistok.eval.reconstruction import psnr
from vistok.files import atomic_folder, write_json
from vistok.pipelines import Pipeline
from vistok.progress import track
from vistok.tokenizers.base import Tokenizer
from vistok.types import to_json

GRID, NPZ, RECORD = "grid.png", "samples.npz", "samples.json"
GRID_IMAGES = 64


def write_samples(
    pipe: Pipeline,
    out: str | Path,
    num_images: int,
    *,
    classes: Sequence[ClassLabel] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    npz: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate ``num_images`` images into the folder ``out``, which appears whole or not at all.

    It gets 000000.png, 000001.png, …; grid.png with the first 64; samples.json with all that made them; and with
    ``npz`` samples.npz, which ADM-style evaluators read. Image i is of class ``classes[i % len(classes)]``.

    Args:
        classes: by id or by name; None takes all classes in turn, if there are any.
        sampling: options that differ from the pipeline's.

    Returns:
        what samples.json holds.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError, ConfigError: as the pipeline does.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already and is not empty; choose another folder or remove it first")
    if num_images < 1:
        raise ValueError(f"the number of images must be at least 1, got {num_images}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sampling = dict(sampling or {})
    labels = _labels(pipe, classes, num_images)
    record = {
        "num_images": num_images,
        "seed": seed,
        "labels": labels,
        "options": to_json(dataclasses.asdict(pipe.options(**sampling))),
        "tokenizer": pipe.tokenizer.fingerprint(),
        "generator": pipe.generator.fingerprint(),
        "device": str(pipe.device),
        "vistok_version": __version__,
    }
    shown = []
    with atomic_folder(out, replace=True) as partial, ExitStack() as stack:
        writer = stack.enter_context(npz_writer(partial / NPZ, num_images)) if npz else None
        starts = range(0, num_images, batch_size)
        for start in track(starts, f"{num_images:,} samples", len(starts)):
            count = min(batch_size, num_images - start)
            what = {"num_images": count} if labels is None else {"class_labels": labels[start : start + count]}
            images = pipe(**what, seed=seed, index_start=start, batch_size=batch_size, **sampling).images
            for index, image in enumerate(images, start):
                image.save(partial / f"{index:06d}.png")
            if writer is not None:
                writer.write(images)
            shown += images[: GRID_IMAGES - len(shown)]
        save_png(grid(shown, _columns(classes)), partial / GRID)
        write_json(partial / RECORD, record)
    return record


def reconstruct_files(tokenizer: Tokenizer, files: Sequence[str | Path], out: str | Path) -> list[float]:
    """Write a PNG of image files (ADM's centre crop) over their reconstructions; return the PSNR of each in dB.

    Raises:
        FileNotFoundError, ValueError: a file that is absent or no image.
    """
    channels, *size = tokenizer.image_shape
    pixels = from_pil([open_picture(file) for file in files], tuple(size), channels)
    parameter = next(tokenizer.parameters())
    rows = [tokenizer.reconstruct(row[None].to(parameter.device, parameter.dtype)).float().cpu() for row in pixels]
    reconstructions = torch.cat(rows)
    save_png(comparison(pixels, reconstructions), out)
    return psnr(to_uint8(pixels) / 255, to_uint8(reconstructions) / 255).tolist()


def _labels(pipe: Pipeline, classes: Sequence[ClassLabel] | None, num_images: int) -> list[int] | None:
    if classes is None:
        count = pipe.generator.num_classes
        ids = list(range(count)) if count else None
    else:
        ids = pipe.class_ids(classes)
    return None if ids is None else [ids[index % len(ids)] for index in range(num_images)]


def _columns(classes: Sequence[ClassLabel] | None) -> int | None:
    """One column per class, where there are few; None leaves it to the grid."""
    return len(classes) if classes is not None and 1 < len(classes) <= 16 else None
