"""Images with targets: a tokenizer reads an image of one folder, and reconstructs that of the same name in another."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import torch

from vistok.data.batches import Failures, ImageBatch
from vistok.data.config import DataConfig
from vistok.data.decoding import ImageDecoder
from vistok.data.folders import FolderSource
from vistok.data.image_batches import ImageBatches, as_array
from vistok.data.sources import ImageSource, UnreadableImageError
from vistok.data.transforms import ImageTransform, to_pixels


class PairedBatches(ImageBatches):
    """Batches whose ``target`` is the image of the same name in another folder, prepared in the same way.

    A pair is left out if one of its images cannot be read.

    Args:
        source: the images to read; they lie in the folder ``root``, but may be selected or kept in memory.
        root: the whole folder of these images; the names of its files say which targets belong to them.
        targets: the folder of targets. It may hold more images, which are not used.
        transform: of both images; it must not be random, or they would not show the same part.

    Raises:
        ValueError: an image has no target, or the transform is random.
    """

    def __init__(
        self,
        source: ImageSource,
        root: FolderSource,
        targets: FolderSource,
        transform: ImageTransform,
        *,
        seed: int = 0,
    ) -> None:
        if transform.crops_randomly or transform.flip or transform.affine is not None:
            raise ValueError(
                "data.target_root needs pixels and targets of the same part: take data.crop=center or resize, no "
                "data.flip and no data.affine"
            )
        super().__init__(source, transform, seed=seed)
        known = {key: index for index, key in enumerate(stems(targets))}
        keys = {root.name(index): key for index, key in enumerate(stems(root))}
        wanted = [keys[source.name(index)] for index in range(len(source))]
        missing = [key for key in wanted if key not in known]
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(wanted):,} images have no target of their name, such as {missing[0]}; the "
                "folder of data.target_root must hold a file for each, in the same folders"
            )
        self.targets, self._positions = targets, [known[key] for key in wanted]

    def load(self, indices: np.ndarray, epoch: int) -> tuple[ImageBatch, Failures]:
        batch, failures = super().load(indices, epoch)
        images, kept = [], []
        for row, index in enumerate(batch.indices.tolist()):
            try:
                image, _ = self.targets[self._positions[index]]
            except UnreadableImageError as error:
                failures[index] = str(error)
                continue
            images.append(as_array(self.transform.crop_image(image)))
            kept.append(row)
        rows = torch.tensor(kept, dtype=torch.int64)
        target = to_pixels(np.stack(images)) if images else torch.empty(0)
        return batch._replace(
            pixels=batch.pixels[rows] if kept else torch.empty(0),
            labels=batch.labels[rows],
            indices=batch.indices[rows],
            target=target,
        ), failures


def paired(source: ImageSource, config: DataConfig, transform: ImageTransform) -> PairedBatches:
    """The batches of a config with a ``target_root``, which is read with the split of ``root``."""
    decoder = ImageDecoder(config.channels, config.reading, side=config.image_size)
    root, targets = (_folder(str(path), config.split, decoder) for path in (config.root, config.target_root))
    return PairedBatches(source, root, targets, transform, seed=config.seed)


def _folder(path: str, split: str | None, decoder: ImageDecoder) -> FolderSource:
    return FolderSource(path, split=split, decoder=decoder)


def stems(source: FolderSource) -> list[str]:
    """The paths of a source's files below the split, without extensions: they pair an image with its target."""
    paths = (source.files.path(index).removeprefix(source.prefix) for index in range(len(source)))
    return [str(PurePosixPath(path).with_suffix("")) for path in paths]
