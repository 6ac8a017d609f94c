"""Encodes images with a trained tokenizer into a token cache, which generators are trained on."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vistok.data.clip_sources import ClipSource
from vistok.data.clips import ClipBatches, repeat_last
from vistok.data.config import DataConfig
from vistok.data.loader import (
    Failures,
    ImageBatch,
    ImageBatches,
    InMemory,
    Loader,
    TooManyUnreadableError,
    batch_reader,
    cached,
    check_failures,
    listed,
)
from vistok.data.opening import open_source
from vistok.data.order import ShardOrder
from vistok.data.ragged import Piece
from vistok.data.sources import ImageSource
from vistok.data.token_writer import Samples, TokenShards
from vistok.data.tokens import Content, TokenCache
from vistok.data.transforms import ImageTransform, ten_crop
from vistok.pipelines.folders import TOKENIZER
from vistok.text import TEXT, PromptEncoder
from vistok.text.captions import CaptionReader
from vistok.tokenizers.base import Tokenizer
from vistok.types import ConditionSpec, IdSpec, TokenSpec, to_json
from vistok.utils.outputs import collected, unfinished
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track
from vistok.utils.spelling import suggestion

log = logging.getLogger(__name__)

SHARD_SIZE = 4096
"""Images per shard: the most that a killed process loses."""
NO_TEXT = PromptEncoder()

MOST_VIEWS, LARGEST_MARGIN = 1000, 4
AUGMENTATIONS = ("none", "flip", "ten_crop", "ten_crop:MARGIN", "random:K")


def tokenize(
    tokenizer: Tokenizer,
    data: DataConfig,
    out: str | Path,
    *,
    augmentation: str = "none",
    text: PromptEncoder = NO_TEXT,
    refuse_long_texts: bool = False,
    feature_dtype: Literal["float16", "float32"] = "float16",
    given_frames: int = 0,
    latents: bool = False,
    resume: bool = False,
    processes: Processes = ALONE,
) -> TokenCache:
    """Encode every image of ``data`` and write the token cache ``out``, with a copy of the tokenizer inside.

    For latents with a posterior, the moments are stored; training samples them anew in every epoch.

    It runs on the tokenizer's device with ``data.batch_size`` images at a time. The result depends only on the
    arguments. Until it is complete, the shards lie in ``OUT.unfinished/``, where a killed run can resume.

    Args:
        augmentation: the views of each image that are stored; training draws one of them in each epoch:
            ``none``: the image as in evaluation;
            ``flip``: the image and its mirror image;
            ``ten_crop``: corners and centre of the image at 1.1 times the size, and their mirror images;
            ``ten_crop:1.05``: at 1.05 times the size (LlamaGen's recipe for ImageNet draws from both sets);
            ``random:K``: K views with the training augmentation of ``data`` in its first K epochs.
        text: turns captions into conditions; by default captions are not read. An image without a caption is
            unconditional.
        refuse_long_texts: a caption longer than the text encoder's length is an error; otherwise it is cut, and
            counted.
        feature_dtype: the dtype in which features of a text encoder are stored.
        given_frames: each clip is also conditioned on the tokens of its first frames, this many, the last of which is
            repeated to a whole clip; 0 is off.
        latents: stores the latents before quantization instead of ids, for a tokenizer with the quantizer
            ``multi_scale_bsq``: training with bitwise self-correction flips other bits in every step.
        resume: keeps the shards that an unfinished run has written.
        processes: the processes that share the work; each calls this function with the same arguments.

    Raises:
        FileExistsError: ``out`` exists; or an unfinished one exists, and ``resume`` is False.
        ValueError: an image size or channels that the tokenizer cannot read, an unknown augmentation, or ``latents``
            with another quantizer.
        ResumeError: nothing to resume, or shards of other images or of another tokenizer.
        TooManyUnreadableError: more than 1 % of the images cannot be read.
        FolderInUseError: another process writes ``out``.
        CaptionError, TextError: captions cannot be read, or are too long.
    """
    out = Path(out)
    if latents and not tokenizer.corrects_bits:
        raise ValueError(
            f"{type(tokenizer).__name__} has no bits of scales that self-correction could turn: leave latents out, or "
            "take a tokenizer with the quantizer multi_scale_bsq"
        )
    content: Content = "latents" if latents else "moments" if tokenizer.has_posterior else "tokens"
    encoder = SampleEncoder(
        tokenizer,
        content,
        data.batch_size,
        CaptionReader(open_source(data), data.captions, text, refuse_long=refuse_long_texts),
        GivenFrames(tokenizer, given_frames) if given_frames else None,
    )
    _tokenize(
        encoder,
        data,
        out,
        augmentation=augmentation,
        feature_dtype=feature_dtype,
        resume=resume,
        processes=processes,
    )
    cache = TokenCache(out)
    if processes.is_first:
        _warn_of_missing_texts(cache)
    return cache


@dataclass(frozen=True)
class SampleEncoder:
    """Makes the samples of a token cache of batches.

    Attributes:
        tokenizer: makes the tokens.
        content: what is stored of them.
        batch_size: images at a time.
        captions: the texts of the images, and what makes conditions of them.
        given: makes conditions of the first frames of clips; None is off.
    """

    tokenizer: Tokenizer
    content: Content
    batch_size: int
    captions: CaptionReader
    given: GivenFrames | None

    @property
    def condition(self) -> ConditionSpec:
        """The spec of the samples' condition, without classes."""
        spec = self.captions.text.spec
        return spec if self.given is None else replace(spec, given=self.given.spec)

    def samples(self, batch: ImageBatch, shards: TokenShards) -> Samples:
        """The samples of a batch of views (B, V, C, H, W), checked by ``shards``."""
        tokens = _encode(self.tokenizer, batch.pixels, self.batch_size, self.content)
        given = {} if self.given is None else self.given.of(batch, self.batch_size)
        return shards.checked(tokens, batch.labels, self.captions.of(batch) | given)


def _tokenize(
    encoder: SampleEncoder,
    data: DataConfig,
    out: Path,
    *,
    augmentation: str,
    feature_dtype: Literal["float16", "float32"],
    resume: bool,
    processes: Processes,
) -> None:
    if out.exists():  # checked before any work; an empty folder counts, too
        raise FileExistsError(f"{out} exists already; choose another folder for the tokens or remove it first")
    tokenizer, captions = encoder.tokenizer, encoder.captions
    spec = check_size(tokenizer, data)
    views = parse_augmentation(augmentation)
    source = captions.source
    reader = views.reader(source, data)
    shards = TokenShards(
        unfinished(out),
        dataclasses.asdict(spec),
        tokenizer.fingerprint(),
        views=views.count,
        content=encoder.content,
        classes=source.classes,
        source_fingerprint=source.fingerprint(),
        condition=encoder.condition,
        text=captions.text.identities,
        feature_dtype=feature_dtype,
    )
    settings = _settings(data, augmentation) | ({} if encoder.given is None else {"given_frames": encoder.given.count})
    settings = to_json(shards.header | settings)
    with collected(out, settings, resume=resume, processes=processes, hopeless=TooManyUnreadableError) as folder:
        count = math.ceil(len(source) / SHARD_SIZE)
        mine = [number for number in range(processes.index, count, processes.count) if not shards.is_written(number)]
        order = ShardOrder(len(source), data.batch_size, tuple(mine), SHARD_SIZE)
        loader = Loader(reader, order, num_workers=data.num_workers)
        tokenizer.eval()
        _write_shards(encoder, loader, shards, mine)
        processes.wait()
        failures = shards.failures()
        check_failures(failures, len(source))
        if processes.is_first:
            if failures:
                log.warning("%d images could not be read and have no tokens:\n%s", len(failures), listed(failures))
            shards.write_index(count)
            tokenizer.save_pretrained(folder / TOKENIZER)
            if captions.text.parts:
                captions.text.save(folder / TEXT)


class GivenFrames:
    """Encodes the first frames of clips, for models that predict the rest.

    Args:
        tokenizer: of clips, with one id per position.
        count: number of given frames; the last one is repeated to a whole clip.

    Raises:
        ValueError: another kind of tokenizer, or ``count`` is not below the frames of a clip.
    """

    def __init__(self, tokenizer: Tokenizer, count: int):
        shape, spec = tokenizer.input_shape, tokenizer.spec
        if len(shape) != 4 or not spec.discrete or spec.depth != 1:
            raise ValueError(
                f"frames are given to tokenizers of clips with one id per position; {type(tokenizer).__name__} is none"
            )
        if not 1 <= count < shape[1]:
            raise ValueError(f"given_frames must lie in 1..{shape[1] - 1} for clips of {shape[1]} frames, got {count}")
        self.tokenizer, self.count = tokenizer, count
        self.spec = IdSpec(spec.num_ids, spec.length)

    def of(self, batch: ImageBatch, batch_size: int) -> dict[str, Sequence[Sequence[Piece]]]:
        """The given tokens of each clip, one sequence per view."""
        views, length = batch.pixels.shape[1], self.tokenizer.input_shape[1]
        first = batch.pixels[:, :, :, : self.count].flatten(0, 1)  # (B * V, C, count, H, W)
        ids = _encode(self.tokenizer, repeat_last(first, length).unflatten(0, (-1, views)), batch_size).numpy()
        return {"given": [[Piece(view, len(view)) for view in clip] for clip in ids]}


def _warn_of_missing_texts(cache: TokenCache) -> None:
    for counts in cache.texts.values():
        if counts["samples_without"]:
            log.warning(
                "%d of %d images have no caption: they are unconditional%s",
                counts["samples_without"],
                len(cache),
                "" if counts["texts"] else "; is captions.jsonl, .txt or data.caption_column missing?",
            )
        if counts["texts_cut"]:
            log.warning("%d of %d captions are too long and were cut", counts["texts_cut"], counts["texts"])


def _write_shards(encoder: SampleEncoder, loader: Loader, shards: TokenShards, numbers: Sequence[int]) -> None:
    """Encode the loader's batches, which belong to the shards ``numbers``, and write each shard when it is whole."""

    def write(number: int, batches: Iterable[ImageBatch]) -> None:
        samples = [encoder.samples(batch, shards) for batch in batches]
        failures = {index: why for index, why in loader.failures.items() if index // SHARD_SIZE == number}
        shards.write(number, samples, failures)
        check_failures(shards.failures(), len(loader.reader))  # with those of other processes and of earlier runs

    batches = track(loader, "tokens", len(loader))
    for number, parts in itertools.groupby(batches, lambda batch: int(batch.indices[0]) // SHARD_SIZE):
        write(number, parts)
    for number in numbers:
        if not shards.is_written(number):
            write(number, [])  # none of its images could be read


def _settings(data: DataConfig, augmentation: str) -> dict[str, Any]:
    """The settings that the shards depend on, besides the header of the cache."""
    names: tuple[str, ...] = ("image_size", "channels", "reading", "crop", "flip", "affine", "seed", "captions")
    names += () if data.num_frames is None else ("num_frames", "frame_stride", "clip_start", "short_clips")
    values = dataclasses.asdict(data)
    return {"augmentation": augmentation, "shard_size": SHARD_SIZE, **{name: values[name] for name in names}}


def check_size(tokenizer: Tokenizer, data: DataConfig) -> TokenSpec:
    """The spec of the tokens of the images or clips in ``data``.

    Raises:
        ValueError: the tokenizer cannot read this size, number of channels or number of frames.
    """
    channels, *frames, height, width = tokenizer.input_shape
    if data.channels != channels:
        raise ValueError(f"this tokenizer reads {channels} channels; set data.channels={channels}, not {data.channels}")
    if frames and data.num_frames is None:
        raise ValueError(f"this tokenizer reads clips; set data.num_frames={frames[0]}")
    if data.num_frames is not None and not frames:
        raise ValueError(
            f"this tokenizer reads images, not clips of {data.num_frames} frames; leave data.num_frames out"
        )
    try:
        return tokenizer.spec_for(data.input_shape)
    except ValueError as error:
        if frames and data.num_frames != frames[0]:
            raise ValueError(
                f"data.num_frames is {data.num_frames}, but this tokenizer was built for {frames[0]} frames: set "
                f"data.num_frames={frames[0]} ({error})"
            ) from error
        raise ValueError(
            f"data.image_size is {data.image_size}, but this tokenizer was built for {height}x{width}: set "
            f"data.image_size={height} ({error})"
        ) from error


@torch.no_grad()
def _encode(tokenizer: Tokenizer, pixels: Tensor, batch_size: int, content: Content = "tokens") -> Tensor:
    """Encode pixels (B, V, C, H, W), ``batch_size`` images at a time.

    Returns tokens (B, V, L[, depth or D]), moments (B, V, L, 2D) or latents before quantization (B, V, h * w, D).
    """
    images = pixels.flatten(0, 1).split(batch_size)
    encode = {"moments": tokenizer.encode_moments, "latents": tokenizer.encode_latents}.get(content, tokenizer.encode)
    tokens = [encode(part.to(tokenizer.device, tokenizer.dtype)).cpu() for part in images]
    return torch.cat(tokens).unflatten(0, pixels.shape[:2])


class FixedViewBatches:
    """A batch reader with fixed views of every image; pixels are (B, V, C, H, W)."""

    def __init__(self, images: ImageBatches | ClipBatches, views: FixedViews, size: int) -> None:
        self.images, self.views, self.size = images, views, size

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[ImageBatch, Failures]:
        batch, failures = self.images.load(indices, epoch)
        return batch._replace(pixels=self.views.cut(batch.pixels, self.size)) if len(batch.indices) else batch, failures


class RandomViewBatches:
    """A batch reader with the views of the first training epochs; pixels are (B, V, C, H, W)."""

    def __init__(self, images: ImageBatches | ClipBatches, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[ImageBatch, Failures]:
        views = [self.images.load(indices, view) for view in range(self.count)]
        (first, failures), *_ = views  # an unreadable image is missing in every view
        return first._replace(pixels=torch.stack([batch.pixels for batch, _ in views], 1)), failures


@dataclass(frozen=True)
class FixedViews:
    """Views that are cut from an image that is prepared as for evaluation.

    Attributes:
        count: number of views.
        cut: from pixels (B, C, H, W) and the size of a view to (B, count, C, size, size).
        margin: side of the prepared image, relative to that of a view.
    """

    count: int
    cut: Callable[[Tensor, int], Tensor]
    margin: float = 1.0

    def reader(self, source: ImageSource | ClipSource, data: DataConfig) -> FixedViewBatches:
        if isinstance(source, ClipSource):
            if self.margin > 1:
                raise ValueError("ten_crop cuts images; clips have the augmentations none, flip and random:K")
            return FixedViewBatches(batch_reader(source, data, augmented=False), self, data.image_size)
        size = int(data.image_size * self.margin)
        if self.margin > 1 and size == data.image_size:
            raise ValueError(f"a margin of {self.margin} adds no pixel to {size}, so that all crops would be equal")
        transform = ImageTransform(size, data.crop).without_augmentation()
        return FixedViewBatches(ImageBatches(source, transform), self, data.image_size)


@dataclass(frozen=True)
class RandomViews:
    """``count`` views with the augmentation of training."""

    count: int

    def reader(self, source: ImageSource | ClipSource, data: DataConfig) -> RandomViewBatches:
        if isinstance(source, ClipSource):
            source = cached(source, data, augmented=True)
            return RandomViewBatches(batch_reader(source, data, augmented=True), self.count)
        transform = ImageTransform(data.image_size, data.crop, data.flip, data.affine)
        if transform == transform.without_augmentation():
            raise ValueError(
                f"augmentation 'random:{self.count}' would store {self.count} equal views: set data.flip=true, "
                "data.affine.… or data.crop=random_resized, or choose another augmentation"
            )
        if data.cache == "memory":
            source = InMemory(source, transform)
        return RandomViewBatches(ImageBatches(source, transform, seed=data.seed), self.count)


def parse_augmentation(name: str) -> FixedViews | RandomViews:
    """The views of an augmentation. Raises ValueError if the name is unknown."""
    if name in FIXED_VIEWS:
        return FIXED_VIEWS[name]
    kind, _, argument = name.partition(":")
    if kind == "ten_crop":
        return replace(FIXED_VIEWS[kind], margin=_margin(name, argument))
    if kind == "random":
        if len(argument) < 5 and argument.isdecimal() and 0 < int(argument) <= MOST_VIEWS:
            return RandomViews(int(argument))
        raise ValueError(
            f"augmentation {name!r}: random needs a number of views, from 1 to {MOST_VIEWS:,}, for example random:10"
        )
    hint = suggestion(name, AUGMENTATIONS) or "."
    raise ValueError(f"unknown augmentation {name!r}{hint} Known: {', '.join(AUGMENTATIONS)}.")


def _margin(name: str, text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = math.nan
    if not 1 < margin <= LARGEST_MARGIN:
        raise ValueError(
            f"augmentation {name!r}: the images must grow by a factor above 1, at most {LARGEST_MARGIN}, for example "
            "ten_crop:1.05"
        )
    return margin


def single_view(pixels: Tensor, size: int) -> Tensor:
    return pixels[:, None]


def with_mirror_image(pixels: Tensor, size: int) -> Tensor:
    return torch.stack([pixels, pixels.flip(-1)], 1)


FIXED_VIEWS = {
    "none": FixedViews(1, single_view),
    "flip": FixedViews(2, with_mirror_image),
    "ten_crop": FixedViews(10, ten_crop, margin=1.1),
}
