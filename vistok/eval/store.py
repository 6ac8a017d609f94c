"""The feature files of a benchmark, one per range of images, so that an interrupted benchmark can resume."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from vistok.data.pictures import npz_writer
from vistok.eval.features import Extraction
from vistok.eval.metrics import Moments
from vistok.eval.plan import BenchmarkError
from vistok.utils.files import atomic_file
from vistok.utils.processes import Processes
from vistok.utils.tensors import load_file, save_file

PREVIEWS = 64  # images kept for the report's grid
SAMPLES = "samples.npz"


class FeatureStore:
    """Features of generated images, one safetensors file per range, each written atomically.

    A file holds ``digests`` (n, 32) of the pixels, ``feature.NAME`` (n, D) float32, and ``preview``, the images that
    the report shows. With ``keep_images`` all pixels are stored too, in files that ``write_npz`` joins and removes.

    Args:
        folder: the folder of one ``Setting``.
        shards: all ranges [start, stop) of images, in order.
        size: (H, W) of the images.
        keep_images: whether to store the pixels as well.
    """

    def __init__(
        self, folder: Path, shards: Sequence[tuple[int, int]], size: tuple[int, int], *, keep_images: bool
    ) -> None:
        self.folder, self.shards, self.size, self.keep_images = folder, shards, size, keep_images

    def missing(self) -> list[tuple[int, int]]:
        """The ranges that are not stored yet."""
        return [shard for shard in self.shards if not self._is_there(shard)]

    def todo(self, processes: Processes) -> list[tuple[int, int]]:
        """The ranges that are not stored yet and that this process makes."""
        mine = set(self.shards[processes.index :: processes.count])
        return [shard for shard in self.missing() if shard in mine]

    def _is_there(self, shard: tuple[int, int]) -> bool:
        if not self._features(shard).exists():
            return False
        return not self.keep_images or (self.folder / SAMPLES).exists() or self._pixels(shard).exists()

    def write(self, shard: tuple[int, int], images: Tensor, extraction: Extraction) -> None:
        """Store a range: its images, uint8 (n, 3, H, W), and the result of the feature pass over them."""
        tensors = {f"feature.{name}": rows.contiguous() for name, rows in extraction.features.items()}
        tensors["digests"] = extraction.digests
        tensors["preview"] = images[: max(0, PREVIEWS - shard[0])].contiguous()
        if self.keep_images:
            with atomic_file(self._pixels(shard)) as temporary, open(temporary, "wb") as file:
                np.save(file, images.permute(0, 2, 3, 1).contiguous().numpy())
        with atomic_file(self._features(shard)) as temporary:
            save_file(tensors, temporary)  # last: its existence marks the range as complete

    def read(self, *, keep: Sequence[str], moments: Sequence[str]) -> Extraction:
        """The result of one feature pass over all images; see ``FeaturePass``.

        Raises:
            BenchmarkError: a file is damaged.
        """
        running: dict[str, Moments] = {}
        kept: dict[str, list[Tensor]] = {name: [] for name in keep}
        digests = []
        for shard in self.shards:
            tensors = self._load(shard)
            digests.append(tensors["digests"])
            for name in keep:
                kept[name].append(tensors[f"feature.{name}"])
            for name in moments:
                rows = tensors[f"feature.{name}"]
                running.setdefault(name, Moments(rows.shape[1])).update(rows)
        features = {name: torch.cat(parts) for name, parts in kept.items()}
        return Extraction(self.size, torch.cat(digests), features, running)

    def previews(self) -> list[Image.Image]:
        """The first images, at most ``PREVIEWS``, for the report."""
        found: list[Image.Image] = []
        for shard in self.shards:
            if shard[0] >= PREVIEWS:
                break
            arrays = self._load(shard)["preview"].permute(0, 2, 3, 1).numpy()
            found += [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
        return found

    def write_npz(self) -> Path:
        """Join the pixels of all ranges into one ADM-style .npz and remove their files; returns its path."""
        path = self.folder / SAMPLES
        if not path.exists():
            with npz_writer(path, self.shards[-1][1]) as writer:
                for shard in self.shards:
                    writer.write(map(Image.fromarray, np.load(self._pixels(shard))))
        shutil.rmtree(self.folder / "pixels", ignore_errors=True)
        return path

    def _load(self, shard: tuple[int, int]) -> dict[str, Tensor]:
        path = self._features(shard)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise BenchmarkError(f"{path} is damaged ({error}); remove it and run the benchmark again") from error
        count, previews = shard[1] - shard[0], max(0, min(PREVIEWS, shard[1]) - shard[0])
        lengths = {"digests": count, "preview": previews} | {
            name: count for name in tensors if name.startswith("feature.")
        }
        wrong = [
            name for name, length in lengths.items() if name not in tensors or tensors[name].shape[:1] != (length,)
        ]
        if wrong or len(lengths) < 3:
            raise BenchmarkError(
                f"{path} is damaged: it lacks {', '.join(wrong) or 'features'} of {count} images; remove it and run "
                "the benchmark again"
            )
        return tensors

    def _features(self, shard: tuple[int, int]) -> Path:
        return self.folder / "features" / f"{shard[0]:08d}-{shard[1]:08d}.safetensors"

    def _pixels(self, shard: tuple[int, int]) -> Path:
        return self.folder / "pixels" / f"{shard[0]:08d}-{shard[1]:08d}.npy"
