"""Folders of samples and pictures of reconstructions, as the command line writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from vistok._version import __version__
from vistok.data.clips import ClipBatches, ClipTransform
from vistok.data.decoding import ImageDecoder
from vistok.data.movies import save_gif, save_mp4, shown, to_frames
from vistok.data.pictures import from_pil, npz_writer, open_picture, save_png, to_pil, to_uint8
from vistok.data.sheets import sheet
from vistok.data.video_files import VideoSource
from vistok.draws import Keys
from vistok.eval.reconstruction import psnr
from vistok.eval.video import psnr as psnr_of_clips
from vistok.pipelines import Pipeline
from vistok.pipelines.classes import ClassLabel
from vistok.pipelines.display import overview
from vistok.pipelines.generation import PipelineOutput
from vistok.tokenizers.base import Tokenizer
from vistok.types import to_json
from vistok.utils.devices import dtype_of
from vistok.utils.files import check_file_to_write, write_json
from vistok.utils.numbers import MOST_IMAGES, check_seed, check_whole
from vistok.utils.outputs import collected
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import Bar

GRID, NPZ, RECORD = "grid.png", "samples.npz", "samples.json"
GRID_IMAGES = 64
PAIRS = 8
"""The most originals in a row over their reconstructions."""
STRIP = 128
"""The least side in pixels of an image on a sheet, so that small losses can be seen."""


def write_samples(
    pipe: Pipeline,
    out: str | Path,
    num_images: int,
    *,
    classes: Sequence[ClassLabel] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    npz: bool = False,
    sampling: Mapping[str, Any] | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Generate ``num_images`` images into the folder ``out``, which appears when all are finished.

    The folder gets 000000.png, 000001.png, … (of clips their frames in a row, with 000000.mp4 and 000000.gif);
    grid.png with the first 64; samples.json with the settings; and with ``npz`` samples.npz, which ADM-style evaluators
    read. Until all are finished the images lie in ``OUT.unfinished/``, where ``resume`` continues.

    Image i is of class ``classes[i % len(classes)]``, or of the prompt ``prompts[i % len(prompts)]``; it is the same
    whatever the batch size and the number of processes.

    Args:
        classes: by id or by name; None takes all classes in turn, if there are any.
        prompts: texts, for a generator that takes them.
        negative_prompt: what guidance leads away from.
        sampling: options that differ from the pipeline's.
        resume: keep the images that an unfinished run has written.
        processes: the processes that share the work; each makes this call with the same arguments.

    Returns:
        the content of samples.json.

    Raises:
        FileExistsError: ``out`` is not empty; or ``OUT.unfinished`` exists and ``resume`` is False.
        ResumeError: there is nothing to resume, or it was made with other settings.
        FolderInUseError: another process writes ``out``.
        ValueError, ConfigError: as the pipeline does.
    """
    out = Path(out)
    check_whole("the number of images", num_images, least=1, most=MOST_IMAGES)
    check_seed(seed)
    check_whole("batch_size", batch_size, least=1)
    clips = len(pipe.tokenizer.input_shape) == 4
    if clips and npz:
        raise ValueError("samples.npz holds images for their evaluators; clips are scored from folders, without --npz")
    options: dict[str, Any] = dict(sampling or {})
    what = _what(pipe, classes, prompts, num_images)
    named = {} if prompts is None else {"prompts": what["prompt"], "text": pipe.text.identities}
    negative: dict[str, Any] = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    settings = {
        "num_images": num_images,
        "seed": seed,
        "labels": what.get("class_labels"),
        **named,
        **negative,
        "options": to_json(dataclasses.asdict(pipe.options(**options))),
        "tokenizer": pipe.tokenizer.fingerprint(),
        "generator": pipe.generator.fingerprint(),
    }
    where = {"device": str(pipe.device), "dtype": dtype_of(pipe.generator)}
    record = settings | where | {"vistok_version": __version__}
    with collected(out, settings, resume=resume, processes=processes) as folder:
        files = [folder / f"{index:06d}.png" for index in range(num_images)]
        ranges = _batches(files, batch_size, processes)
        with Bar(f"{num_images:,} samples", sum(stop - start for start, stop in ranges)) as bar:
            done = 0
            for start, stop in ranges:
                part: dict[str, Any] = {name: values[start:stop] for name, values in what.items()}
                part = part or {"num_images": stop - start}
                part |= bar.of_batch(done, stop - start, pipe.generator.spec.length)
                made = pipe(**part, **negative, seed=seed, index_start=start, batch_size=batch_size, **options)
                _write(made, files[start:stop])
                done += stop - start
                bar.show(done)
        processes.wait()
        if processes.is_first:
            _finish(files, record, _labels(pipe, what), clips=clips, npz=npz)
    return record


def _write(made: PipelineOutput, files: Sequence[Path]) -> None:
    """Write images as PNG; clips as MP4, GIF, and a PNG of their frames. The PNG comes last and marks a sample as
    complete."""
    if made.pixels.ndim == 5:
        for frames, file in zip(made.videos, files, strict=True):
            save_mp4(frames, file.with_suffix(".mp4"))
            save_gif(frames, file.with_suffix(".gif"))
    for image, file in zip(made.images, files, strict=True):
        save_png(image, file)


def _batches(files: Sequence[Path], batch_size: int, processes: Processes) -> list[tuple[int, int]]:
    """The ranges of images that this process has to make."""
    ranges = []
    for start, stop in processes.ranges(len(files), batch_size):
        missing = [index for index in range(start, stop) if not files[index].exists()]
        if missing:
            ranges.append((missing[0], stop))
    return ranges


def _labels(pipe: Pipeline, what: Mapping[str, Sequence[Any]]) -> list[str]:
    """The class or prompt of each image, for the labels of a grid; empty if there are neither."""
    if "prompt" in what:
        return [text or "" for text in what["prompt"]]
    names = pipe.class_names
    return [names[label].split(",")[0] if names else str(label) for label in what.get("class_labels", ())]


def _finish(files: Sequence[Path], record: Mapping[str, Any], labels: Sequence[str], *, clips: bool, npz: bool) -> None:
    """Write grid.png, samples.npz and samples.json."""
    folder = files[0].parent
    if npz:
        with npz_writer(folder / NPZ, len(files)) as writer:
            for file in files:
                writer.write([open_picture(file)])
    save_png(overview([open_picture(file) for file in files[:GRID_IMAGES]], labels, clips=clips), folder / GRID)
    write_json(folder / RECORD, record)


def reconstruct_files(tokenizer: Tokenizer, files: Sequence[str | Path], out: str | Path) -> list[float]:
    """Write a PNG of image files (ADM's centre crop) over their reconstructions; return the PSNR of each in dB.

    Tokenizers of clips read the middle clip of each video; an MP4 next to the PNG shows all clips side by side.

    Raises:
        FileNotFoundError, ValueError: a file is absent or no image.
        UnreadableClipError: a file is no video.
    """
    check_file_to_write(out)
    tokenizer.check_renders("reconstructing files")
    if len(tokenizer.input_shape) == 4:
        return _reconstruct_videos(tokenizer, files, Path(out))
    pixels = _read_pictures(tokenizer, files)
    rows = [tokenizer.reconstruct(row[None].to(tokenizer.device, tokenizer.dtype)).float().cpu() for row in pixels]
    reconstructions = torch.cat(rows)
    decibels = psnr(to_uint8(pixels) / 255, to_uint8(reconstructions) / 255).tolist()
    names = [Path(file).stem for file in files]
    _save_pairs(to_pil(pixels), to_pil(reconstructions), names, [f"{value:.1f} dB" for value in decibels], out)
    return decibels


def _save_pairs(
    originals: Sequence[Image.Image],
    reconstructions: Sequence[Image.Image],
    names: Sequence[str],
    scores: Sequence[str],
    out: str | Path,
) -> None:
    """Write rows of originals, labelled by name, each over a row of their reconstructions, labelled by score."""
    columns, shown, labels = min(PAIRS, len(names)), [], []
    blank = Image.new(originals[0].mode, originals[0].size, "white")
    for start in range(0, len(names), columns):
        here = slice(start, start + columns)
        lacking = columns - len(names[here])
        for images, texts in ((originals, names), (reconstructions, scores)):
            shown += [*images[here], *[blank] * lacking]
            labels += [*texts[here], *[""] * lacking]
    save_png(sheet(shown, columns, labels=labels, least=STRIP), out)


def _read_pictures(tokenizer: Tokenizer, files: Sequence[str | Path]) -> Tensor:
    """Image files as the tokenizer reads them, (B, C, H, W) in [-1, 1]."""
    channels, height, width = tokenizer.image_shape("reconstructing files")
    decoder = ImageDecoder(channels, side=height)
    return from_pil([open_picture(file, decoder) for file in files], (height, width), channels)


def _reconstruct_videos(tokenizer: Tokenizer, files: Sequence[str | Path], out: Path) -> list[float]:
    channels, length, height, width = tokenizer.input_shape
    if height != width:
        raise ValueError(f"videos are cropped to squares, but this tokenizer reads {height}x{width}")
    transform = ClipTransform(length, height, start="center", channels=1 if channels == 1 else 3)
    reader = ClipBatches(VideoSource([Path(file) for file in files], [-1] * len(files)), transform)
    device, dtype = tokenizer.device, tokenizer.dtype
    originals = torch.stack([reader.clip(index, (0.5,) * 4)[0] for index in range(len(files))])
    made = [tokenizer.reconstruct(clip[None].to(device, dtype)).float().cpu() for clip in originals]
    reconstructions = torch.cat(made)
    sheets = [image for pair in zip(shown(originals), shown(reconstructions)) for image in pair]
    names = [text for file in files for text in (Path(file).stem, "decoded")]
    save_png(sheet(sheets, 1, row_labels=names), out)
    columns = [torch.cat(list(clips), -2) for clips in (originals, reconstructions)]  # (C, T, N * H, W) each
    save_mp4(to_frames(torch.cat(columns, -1)[None])[0], out.with_suffix(".mp4"))
    return psnr_of_clips(to_uint8(originals) / 255, to_uint8(reconstructions) / 255).tolist()


@torch.no_grad()
def reconstruct_prefixes(
    tokenizer: Tokenizer, files: Sequence[str | Path], lengths: Sequence[int], out: str | Path
) -> list[list[float]]:
    """Write a PNG with a row per image file: the image, then what its first tokens decode to, for each length.

    Returns:
        the PSNR in dB of each image at each length.

    Raises:
        FileNotFoundError, ValueError: a file is absent or no image, the tokenizer does not decode prefixes, or not
            those of one of the lengths.
    """
    check_file_to_write(out)
    if tokenizer.spec.prefix_step is None:
        raise ValueError(f"{type(tokenizer).__name__} decodes all of its {tokenizer.spec.length} tokens at once only")
    tokenizer.check_renders("reconstructing files")
    pixels, decode = _read_pictures(tokenizer, files), cast(Callable[..., Tensor], tokenizer.decode)
    draws = tokenizer.decoding_draws(Keys.range(0, 1))
    draws = {name: value.expand(len(lengths), *value.shape[1:]) for name, value in draws.items()}
    shown, decibels = [], []
    for original in pixels:
        ids = tokenizer.encode(original[None].to(tokenizer.device, tokenizer.dtype)).expand(len(lengths), -1)
        decoded = decode(ids, lengths=torch.tensor(lengths), draws=draws).float().cpu()
        shown += to_pil(torch.cat([original[None], decoded]))
        truth = original.expand_as(decoded)
        decibels.append(psnr(to_uint8(truth) / 255, to_uint8(decoded) / 255).tolist())
    tokens = [f"{length} token{'s' * (length != 1)}" for length in lengths]
    labels = [
        text
        for file, values in zip(files, decibels, strict=True)
        for text in (Path(file).stem, *(f"{value:.1f} dB" for value in values))
    ]
    drawn = sheet(shown, 1 + len(lengths), column_labels=["original", *tokens], labels=labels, least=STRIP)
    save_png(drawn, out)
    return decibels


def _what(
    pipe: Pipeline, classes: Sequence[ClassLabel] | None, prompts: Sequence[str] | None, num_images: int
) -> dict[str, list[Any]]:
    """The class or prompt of every image, by the name of the pipeline's argument; empty if there are neither."""
    what: dict[str, Sequence[Any]] = {}
    if prompts is not None:
        what["prompt"] = prompts
    if classes is not None:
        what["class_labels"] = pipe.class_ids(classes)
    elif prompts is None and pipe.generator.condition_spec.num_classes:
        what["class_labels"] = range(pipe.generator.condition_spec.num_classes)
    for name, values in what.items():
        if not len(values):
            plural = "prompts" if name == "prompt" else name
            raise ValueError(f"there is nothing to generate: the list of {plural} is empty")
    return {name: [values[index % len(values)] for index in range(num_images)] for name, values in what.items()}
