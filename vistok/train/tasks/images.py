"""Images of a run: held-out images, examples for pictures, and the PSNR of reconstructions."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vistok.data.batches import ImageBatch
from vistok.data.config import DataConfig
from vistok.data.loader import Loader, Source, batch_reader, check_failures, evaluation_loader, no_samples
from vistok.data.opening import open_source
from vistok.data.overlap import shared_images
from vistok.data.sources import ImageSource
from vistok.eval.reconstruction import decibels
from vistok.signatures import ConfigError, check

log = logging.getLogger(__name__)


def held_out_images(trained: DataConfig, trained_source: Source, changes: dict | None) -> Loader[ImageBatch]:
    """A loader of held-out images, whose config is that of the training images with ``changes``; empty if None.

    Raises:
        ConfigError: they are the training images, or have another shape.
    """
    if changes is None:
        return no_samples()
    values = check(DataConfig, asdict(trained) | changes, "validation.data")
    try:
        data = DataConfig(**values)
        source = open_source(data)
    except (ValueError, OSError) as error:
        error.add_note("This is about the held-out images, whose keys are below validation.data.")
        raise
    for key in ("image_size", "channels", "num_frames"):
        asked, own = getattr(data, key), getattr(trained, key)
        if asked != own:
            raise ConfigError(f"validation.data.{key} is {asked}, but the run's images have {own}; leave the key out")
    if all(getattr(data, key) == getattr(trained, key) for key in ("source", "root", "name", "split")):
        raise ConfigError("validation.data names the images that the run trains on; name others: split=test, or a root")
    shared = shared_images(cast(ImageSource, trained_source), cast(ImageSource, source))
    if shared.is_whole:
        raise ConfigError(
            "validation.data names the images that the run trains on, by another name or in a copy "
            f"(such as {shared.example}); name others: split=test, or a root"
        )
    if shared.found:
        log.warning("%s", shared)
    classes, own = source.classes, trained_source.classes
    if classes and classes != own:
        log.warning(
            "the held-out images have other classes (%s) than the trained ones (%s): their labels mean other things, "
            "which matters to losses that read them",
            ", ".join(map(str, classes[:5])),
            ", ".join(map(str, own[:5])) or "none",
        )
    return evaluation_loader(source, data)


def example_batch(source: Source, data: DataConfig, count: int = 8) -> ImageBatch:
    """At most ``count`` images, evenly spread over the source, prepared as for evaluation.

    They are the first readable images of ``count`` equal parts of the source.

    Raises:
        TooManyUnreadableError: the unreadable ones are more than 1 % of the source.
    """
    reader = batch_reader(source, data, augmented=False)
    count, batches = min(count, len(source)), []
    failures: dict[int, str] = {}
    for part in range(count):
        for index in range(part * len(source) // count, (part + 1) * len(source) // count):
            batch, failed = reader.load(np.array([index]), epoch=0)
            failures |= failed
            if not failed:
                batches.append(batch)
                break
    check_failures(failures, len(source))
    pixels, labels, indices = (torch.cat(part) for part in list(zip(*batches))[:3])
    return ImageBatch(pixels, labels, indices)


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """The PSNR in dB, averaged over images, for pixels (B, ...) in [-1, 1]; the reconstruction is clamped."""
    error = (reconstruction.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return decibels(error.clamp_min(1e-12), data_range=2.0).mean()
