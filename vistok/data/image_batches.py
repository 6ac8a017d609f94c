"""Batches of images from a source, which may be kept in memory."""

from __future__ import annotations

import logging

import numpy as np
import torch
from PIL import Image

from vistok.data.batches import Failures, ImageBatch
from vistok.data.sources import ImageSource, UnreadableImageError
from vistok.data.transforms import ImageTransform, to_pixels
from vistok.draws import Keys

log = logging.getLogger(__name__)


class ImageBatches:
    """Reads, crops and augments images of a source. Every random choice is keyed by (seed, epoch, index)."""

    def __init__(self, source: ImageSource, transform: ImageTransform, *, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[ImageBatch, Failures]:
        images, labels, read, failures = [], [], [], {}
        keys = Keys.of(self.seed, indices, step=epoch)
        for index, uniforms in zip(keys.indices, self.transform.crop_uniforms(keys), strict=True):
            try:
                image, label = self.source[index]
            except UnreadableImageError as error:
                failures[index] = str(error)
                continue
            images.append(as_array(self.transform.crop_image(image, uniforms)))
            labels.append(label)
            read.append(index)
        if images:
            pixels = self.transform.augment(to_pixels(np.stack(images)), Keys.of(self.seed, read, step=epoch))
        else:
            pixels = torch.empty(0)
        return ImageBatch(pixels, torch.tensor(labels, dtype=torch.int64), torch.tensor(read)), failures


class InMemory(ImageSource):
    """A source whose images are decoded once. A crop that is not random is done once, too, so that only it is kept."""

    def __init__(self, source: ImageSource, transform: ImageTransform) -> None:
        self._source = source
        self.classes = source.classes
        log.info("decoding %d images into memory", len(source))
        self._samples = [self._decode(index, transform) for index in range(len(source))]

    def _decode(self, index: int, transform: ImageTransform) -> tuple[np.ndarray, int] | UnreadableImageError:
        try:
            image, label = self._source[index]
        except UnreadableImageError as error:
            return error
        return np.asarray(image if transform.crops_randomly else transform.crop_image(image)), label

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        sample = self._samples[index]
        if isinstance(sample, UnreadableImageError):
            raise sample
        return Image.fromarray(sample[0]), sample[1]

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)


def as_array(image: Image.Image) -> np.ndarray:
    """A PIL image as an array (H, W, C) uint8."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
