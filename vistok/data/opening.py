"""Opens the source that a config describes."""

from __future__ import annotations

import math

from vistok.checkpoints.bounds import OversizedError, check_bytes
from vistok.data.clip_shards import ClipShardSource
from vistok.data.clip_sources import ClipSource, SelectedClips
from vistok.data.config import CLIP_SOURCES, DataConfig
from vistok.data.decoding import ImageDecoder
from vistok.data.folders import FolderSource
from vistok.data.huggingface import HuggingFaceSource
from vistok.data.moving_digits import MovingDigitsSource
from vistok.data.shards import ShardSource
from vistok.data.sources import DigitsSource, ImageSource, Selection, TorchvisionSource
from vistok.data.video_files import folder_videos, listed_videos

MOVING_SPANS = 4
"""A video of moving digits is as long as this many clips, so that random clips show different parts of its path."""
_ROOTS = {
    "folder": "a folder or .zip file of images",
    "torchvision": "torchvision's data folder",
    "webdataset": "shards such as shards/train-{0000..0252}.tar",
    "videos": "a folder of videos",
}


def open_source(config: DataConfig) -> ImageSource | ClipSource:
    """Open the source that a config describes, cut down to ``limit`` images or videos.

    Raises:
        ValueError, FileNotFoundError: see the sources. ValueError also if the config lacks a key that the source needs,
            or if a batch is larger than the machine's memory.
    """
    source = _open(config)
    samples, pixels = min(config.batch_size, len(source)), math.prod(config.input_shape)
    try:
        check_bytes(f"data: a batch of {samples} with {pixels:,} numbers each", 4 * samples * pixels)
    except OversizedError as error:
        raise ValueError(f"{error}; lower data.batch_size, data.image_size or data.num_frames") from error
    if config.limit is None or config.limit >= len(source):
        return source
    # Evenly spread: sources lie sorted by class, so the first images would be of one class.
    chosen = [index * len(source) // config.limit for index in range(config.limit)]
    return SelectedClips(source, chosen) if isinstance(source, ClipSource) else Selection(source, chosen)


def _open(config: DataConfig) -> ImageSource | ClipSource:
    if config.num_frames is not None and config.source not in (*CLIP_SOURCES, "webdataset"):
        raise ValueError(
            f"data.source={config.source} holds images; leave data.num_frames out, or take clips from "
            f"{', '.join(CLIP_SOURCES)}, or shards (webdataset)"
        )
    decoder = ImageDecoder(config.channels, config.reading, side=config.image_size)
    if config.source == "digits":
        return DigitsSource(split=config.split, decoder=decoder, variants=config.name)
    if config.source == "moving_digits":
        if config.num_frames is None:
            raise ValueError("data.source=moving_digits needs data.num_frames=…, for example data.num_frames=16")
        if config.name not in (None, "sideways"):
            raise ValueError(f"data.source=moving_digits takes data.name=sideways, or none; got {config.name!r}")
        span = (config.num_frames - 1) * config.frame_stride + 1
        return MovingDigitsSource(
            split=config.split,
            image_size=config.image_size,
            num_frames=MOVING_SPANS * span,
            sideways=config.name == "sideways",
            seed=config.seed,
        )
    if config.source == "video_list":
        if config.name is None:
            raise ValueError("data.source=video_list needs data.name=…, a list file such as trainlist01.txt")
        return listed_videos(config.name, None if config.root is None else str(config.root), decoder=decoder)
    if config.source == "huggingface":
        return _open_huggingface(config, decoder)
    if config.root is None:
        raise ValueError(f"data.source={config.source} needs data.root=…, {_ROOTS[config.source]}")
    if config.source == "webdataset" and config.num_frames is not None:
        return ClipShardSource(config.root, split=config.split)
    if config.source == "webdataset":
        return ShardSource(config.root, split=config.split, decoder=decoder)
    root = str(config.root)
    if config.source == "folder":
        return FolderSource(root, split=config.split, decoder=decoder)
    if config.source == "videos":
        return folder_videos(root, split=config.split, decoder=decoder)
    if config.name is None:
        raise ValueError("data.source=torchvision needs data.name=…, for example data.name=CIFAR10")
    return TorchvisionSource(config.name, root, split=config.split, download=config.download, decoder=decoder)


def _open_huggingface(config: DataConfig, decoder: ImageDecoder) -> ImageSource:
    if (config.name is None) == (config.root is None):
        raise ValueError("data.source=huggingface needs data.name=… (on the hub) or data.root=… (a saved folder)")
    return HuggingFaceSource(
        config.name,
        None if config.root is None else str(config.root),
        split=config.split,
        decoder=decoder,
        image_column=config.image_column,
        label_column=config.label_column,
        caption_column=config.caption_column,
    )
