"""One pass of a feature network over a set of images, for all scores that use its features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vistok.eval.batches import NETWORK_BATCH, Regrouper, filled
from vistok.eval.images import ImageSet
from vistok.eval.metrics import Moments
from vistok.eval.networks import FeatureNetwork
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track


@dataclass
class Extraction:
    """The result of a feature pass over a set of images.

    Attributes:
        size: (H, W) of the images.
        digests: (N, 32) uint8, the SHA-256 of every image's pixels.
        features: kept features by name, float32 (N, D), on the CPU.
        moments: moments of features by name, on the CPU.
    """

    size: tuple[int, int]
    digests: Tensor
    features: dict[str, Tensor]
    moments: dict[str, Moments]

    @property
    def count(self) -> int:
        return len(self.digests)

    @property
    def distinct(self) -> int:
        """Number of different images."""
        return len(self.digests.unique(dim=0))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all pixels, in order; the same images have the same one in a folder, .npz, shards or tensor."""
        return hashlib.sha256(repr(tuple(self.size)).encode() + self.digests.numpy().tobytes()).hexdigest()

    @classmethod
    def concatenate(cls, parts: Sequence[Extraction]) -> Extraction:
        """Join the passes over consecutive parts of a set; empty parts may be left out."""
        first, *others = parts
        if not others:
            return first
        moments = dict(first.moments)
        for part in others:
            moments = {name: moments[name].merge(part.moments[name]) for name in moments}
        return cls(
            size=first.size,
            digests=torch.cat([part.digests for part in parts]),
            features={name: torch.cat([part.features[name] for part in parts]) for name in first.features},
            moments=moments,
        )


class FeaturePass:
    """Runs a feature network over batches of images and keeps the features or moments that scores need.

    The network always gets ``NETWORK_BATCH`` images at a time, whatever the size of the batches.

    Args:
        network: computes the features.
        source: what the images are called in messages.
        keep: features of which every row is kept (for precision and recall, kernel distance, Inception Score).
        moments: features of which only the moments are kept (for Frechet distances).
    """

    def __init__(
        self, network: FeatureNetwork, source: str, *, keep: Sequence[str] = (), moments: Sequence[str] = ()
    ) -> None:
        self._network, self._source = network, source
        self._kept = {name: RowStore() for name in keep}
        self._moments: dict[str, Moments | None] = dict.fromkeys(moments)
        self._digests: list[Tensor] = []
        self._groups = Regrouper(NETWORK_BATCH)

    def add(self, images: Tensor) -> None:
        """Add uint8 images (B, 3, H, W).

        Raises:
            ValueError: features are not finite.
        """
        self._digests.append(digests_of(images))
        for group in self._groups.add(images):
            self._extract(group)

    def _extract(self, images: Tensor) -> None:
        features = {name: rows[: len(images)] for name, rows in self._network(filled(images)).items()}
        for name in {*self._kept, *self._moments}:
            if not bool(features[name].isfinite().all()):
                raise ValueError(
                    f"{self._network.name} gives {name} features that are not finite for images of {self._source}; "
                    "are its weights damaged?"
                )
        for name, rows in self._kept.items():
            rows.append(features[name].cpu())
        for name, running in self._moments.items():
            if running is None:
                running = self._moments[name] = Moments(features[name].shape[1], _float64_device(features[name]))
            running.update(features[name])

    @property
    def is_empty(self) -> bool:
        return not self._digests

    def result(self) -> Extraction:
        """The extraction, after the last image was added.

        Raises:
            ValueError: there are no images.
        """
        rest = self._groups.rest
        if rest is None:
            raise ValueError(f"there is no image of {self._source} to score")
        height, width = rest.shape[-2:]
        if len(rest):
            self._extract(rest)
        return Extraction(
            size=(height, width),
            digests=torch.cat(self._digests),
            features={name: rows.join() for name, rows in self._kept.items()},
            moments={name: running.to("cpu") for name, running in self._moments.items() if running is not None},
        )


def extract_features(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    keep: Sequence[str] = (),
    moments: Sequence[str] = (),
    batch_size: int = 64,
    processes: Processes = ALONE,
) -> Extraction:
    """Run ``network`` once over ``images``, with a progress bar on a terminal; see ``FeaturePass``.

    Each process takes a consecutive part of the images, and all of them return the whole.
    """
    start, stop = processes.part(images.count)
    features = FeaturePass(network, images.source, keep=keep, moments=moments)
    batches = images.batches(batch_size, start, stop) if processes.count > 1 else images.batches(batch_size)
    for batch in track(batches, f"features of {images.source}", -(-(stop - start) // batch_size)):
        features.add(batch)
    return gathered(features, processes)


def gathered(part: FeaturePass, processes: Processes) -> Extraction:
    """Join the consecutive parts (possibly empty) of all processes; every process gets the whole."""
    parts = processes.gather(None if part.is_empty else part.result())
    return Extraction.concatenate([extraction for extraction in parts if extraction is not None])


class RowStore:
    """Collects rows (n, ...) and joins them without holding a second copy: 50,000 features are 400 MB.

    The blocks are so large that the allocator returns the memory of each as soon as it is freed.
    """

    BLOCK = 4096

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free = 0

    def append(self, rows: Tensor) -> None:
        """Copy ``rows`` (B, ...) to the end."""
        while len(rows):
            if not self._free:
                self._blocks.append(rows.new_empty(self.BLOCK, *rows.shape[1:]))
                self._free = self.BLOCK
            some = rows[: self._free]
            self._blocks[-1][self.BLOCK - self._free :][: len(some)] = some
            self._free -= len(some)
            rows = rows[len(some) :]

    def join(self) -> Tensor:
        """All rows; the store is empty afterwards."""
        end = len(self._blocks) * self.BLOCK - self._free
        whole = self._blocks[0].new_empty(end, *self._blocks[0].shape[1:])
        while self._blocks:
            block = self._blocks.pop()
            start = len(self._blocks) * self.BLOCK
            whole[start:end] = block[: end - start]
            end = start
        self._free = 0
        return whole


def digests_of(images: Tensor) -> Tensor:
    """SHA-256 of every image's pixels, (B, 32) uint8, in the order (H, W, C) of image files and .npz.

    Args:
        images: uint8 (B, C, H, W).
    """
    rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    digests = b"".join(hashlib.sha256(row.data).digest() for row in rows)
    return torch.from_numpy(np.frombuffer(digests, np.uint8).reshape(-1, 32).copy())


def _float64_device(features: Tensor) -> torch.device:
    """Where moments are summed: beside the features on a GPU, else on the CPU (not every accelerator has float64)."""
    return features.device if features.is_cuda else torch.device("cpu")
