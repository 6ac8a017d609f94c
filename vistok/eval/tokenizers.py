"""Scores of a tokenizer: a data set against its reconstructions, both streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from vistok.data.batches import ImageBatch
from vistok.data.config import DataConfig
from vistok.data.image_batches import ImageBatches
from vistok.data.opening import open_source
from vistok.data.pictures import to_uint8
from vistok.data.sources import ImageSource
from vistok.data.transforms import ImageTransform
from vistok.eval.batches import NETWORK_BATCH, filled, filled_condition, regrouped
from vistok.eval.images import ImageError
from vistok.eval.networks import FeatureNetwork
from vistok.eval.pairs import evaluate_reconstruction
from vistok.eval.record import check_result_folder, describe_tokenizer, save_result
from vistok.eval.retrieval import evaluate_embeddings
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track

BatchConditions = Callable[[ImageBatch], Condition]
"""Gives the conditions of a batch's images, for tokenizers that decode with texts."""


class DataImages:
    """The images of a data config, without augmentation, as an ``ImageSet``; grey ones are repeated to RGB.

    Raises:
        ImageError: while reading, if an image cannot be read; without it the score would be another one.
    """

    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0  # no warning: the tokenizer reads the same lossy originals
    files_read: ClassVar[None] = None

    def __init__(self, data: DataConfig):
        source = open_source(data)
        transform = ImageTransform(data.image_size, data.crop).without_augmentation()
        self._images = ImageBatches(cast(ImageSource, source), transform)
        self.source = data.title
        self.count = len(source)
        self.size = (data.image_size, data.image_size)

    def loaded(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[ImageBatch]:
        """Yield batches of images ``start`` to ``stop``, in order."""
        stop = self.count if stop is None else stop
        for first in range(start, stop, batch_size):
            batch, failures = self._images.load(np.arange(first, min(first + batch_size, stop)), 0)
            if failures:
                raise ImageError(f"cannot read an image that is to be scored: {next(iter(failures.values()))}")
            yield batch

    def pixels(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield images ``start`` to ``stop``, in order, as float (B, C, H, W) in [-1, 1]."""
        return (batch.pixels for batch in self.loaded(batch_size, start, stop))

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield uint8 (B, 3, H, W), in order."""
        return map(to_rgb, self.pixels(batch_size, start, stop))


class Reconstructions:
    """A tokenizer's reconstructions of ``originals`` as an ``ImageSet``, computed on its device with a progress bar.

    The tokenizer always gets ``NETWORK_BATCH`` images, so that no pixel depends on the size of the batches read.

    Args:
        conditions: conditions for a tokenizer that decodes with texts; None decodes without.
    """

    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0
    files_read: ClassVar[None] = None

    def __init__(self, tokenizer: Tokenizer, originals: DataImages, conditions: BatchConditions | None = None):
        self._tokenizer, self._originals, self._conditions = tokenizer.eval(), originals, conditions
        self.source = f"reconstructions of {originals.source}"
        self.count, self.size = originals.count, originals.size

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield uint8 (B, 3, H, W), in order."""
        count = (self.count if stop is None else stop) - start
        batches = self._originals.loaded(NETWORK_BATCH, start, stop)
        return regrouped(map(self._reconstruct, track(batches, self.source, -(-count // NETWORK_BATCH))), batch_size)

    def _reconstruct(self, batch: ImageBatch) -> Tensor:
        tokenizer, pixels = self._tokenizer, batch.pixels
        condition = condition_of(self._conditions, batch, tokenizer.device)
        made = tokenizer.reconstruct(filled(pixels).to(tokenizer.device, tokenizer.dtype), condition=condition)
        return to_rgb(made[: len(pixels)].cpu())


def condition_of(conditions: BatchConditions | None, batch: ImageBatch, device: torch.device) -> Condition | None:
    """The condition of a batch, padded to NETWORK_BATCH rows as ``filled`` pads the pixels; None without conditions."""
    return None if conditions is None else filled_condition(conditions(batch)).to(device)


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    network: FeatureNetwork | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    conditions: BatchConditions | None = None,
    processes: Processes = ALONE,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score the reconstructions of all images of ``data``.

    See ``evaluate_reconstruction`` for the scores. A tokenizer that decodes to image embeddings gets the
    ``retrieval_scores`` instead.

    Args:
        network, lpips, processes, out: see ``evaluate_reconstruction``.
        conditions: conditions for a tokenizer that decodes with texts; None decodes without.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the images' size or channels are not the tokenizer's.
    """
    check_result_folder(out)
    if tokenizer.embeds:
        result = evaluate_embeddings(tokenizer, data)
        if out is not None and processes.is_first:
            save_result(result, out)
        return result
    tokenizer.check_renders("scoring reconstructions")
    originals = DataImages(data)
    result = evaluate_reconstruction(
        originals,
        Reconstructions(tokenizer, originals, conditions),
        network=network,
        lpips=lpips,
        batch_size=data.batch_size,
        device=tokenizer.device,
        processes=processes,
    )
    if data.split == "train":
        result["warnings"].append(
            "these are training images; papers score held-out ones (one: rFID 1.22 on the training set, about "
            "0.55 on the validation set)"
        )
    result["tokenizer"] = describe_tokenizer(tokenizer, data)
    if out is not None and processes.is_first:
        save_result(result, out)
    return result


def to_rgb(pixels: Tensor) -> Tensor:
    """Grey or RGB pixels (B, 1 or 3, H, W) in [-1, 1] as uint8 (B, 3, H, W)."""
    return to_uint8(pixels.float()).expand(-1, 3, -1, -1)
