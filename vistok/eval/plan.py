"""The plan of a generation benchmark: the label of each image, and the shards that the images are split into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vistok.draws import Keys
from vistok.eval.batches import NETWORK_BATCH
from vistok.types import to_json
from vistok.utils.numbers import MOST_IMAGES, check_seed, check_whole

Labels = Literal["balanced", "random", "none"]
FORMAT = "vistok-benchmark-1"
SHARD_SIZE = 512  # most images per file of features; an interruption loses at most one file
FEWEST_SHARDS = 16  # given enough images, so that several processes can share a small benchmark


class BenchmarkError(ValueError):
    """A benchmark folder that is damaged."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """Everything that determines the samples and their features, except the ``Setting`` of a sweep.

    Two runs with the same plan and setting give the same features, whatever their batch size and number of processes.

    Attributes:
        num_images: number of images per setting.
        labels: "balanced": image i has class i modulo the number of classes; "random": uniform, drawn for each image
            from the seed; "none": unconditional.
        num_classes: 0 if the generator has no classes.
        seed: with the same seed, image i is always the same.
        sampling: the generator's sampling options, without the guidance scale.
        tokenizer, generator: fingerprints of both models.
        network: the feature network, see ``ImageProtocol.describe``.
        dtype: of the generator's weights; 16-bit weights sample other images than 32-bit ones.
        image_size: (H, W) of the images that the tokenizer decodes.
        eval_size: side to which images are resized before they become 8 bit, or None.
    """

    num_images: int
    labels: Labels
    num_classes: int
    seed: int
    sampling: Mapping[str, Any]
    tokenizer: str
    generator: str
    network: Mapping[str, Any]
    dtype: str
    image_size: tuple[int, int]
    eval_size: int | None = None

    def __post_init__(self) -> None:
        check_whole("the number of images", self.num_images, least=2, most=MOST_IMAGES)
        check_seed(self.seed)
        check_whole("eval_size", self.eval_size, least=1, most=10_000, optional=True)
        if self.labels not in get_args(Labels):
            raise ValueError(f"unknown labels {self.labels!r}; known: {', '.join(get_args(Labels))}")
        if self.labels != "none" and not self.num_classes:
            raise ValueError(f"labels {self.labels!r} need a generator with classes; this one is unconditional")

    @property
    def scored_size(self) -> tuple[int, int]:
        """(H, W) of the images that are scored."""
        return self.image_size if self.eval_size is None else (self.eval_size, self.eval_size)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """The range [start, stop) of images in each file of features."""
        return shards_of(self.num_images)

    def labels_of(self, start: int, stop: int) -> list[int] | None:
        """The classes of images ``start`` to ``stop``; None for unconditional images."""
        if self.labels == "none":
            return None
        if self.labels == "balanced":
            return [index % self.num_classes for index in range(start, stop)]
        uniforms = Keys.range(self.seed, stop - start, start).uniform("benchmark.labels")
        return [min(int(u * self.num_classes), self.num_classes - 1) for u in uniforms.tolist()]

    @property
    def warnings(self) -> list[str]:
        if self.labels == "balanced" and self.num_images % self.num_classes:
            return [f"{self.num_images:,} images do not divide evenly among {self.num_classes:,} classes"]
        return []

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT} | asdict(self) | {"image_size": list(self.image_size)}


def recorded_options(pipe: Any, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's sampling options with those of ``sampling``, JSON-ready, without the guidance scale, which each
    ``Setting`` has."""
    options = to_json(asdict(pipe.options(**sampling)))
    options.pop("guidance_scale", None)
    return options


def shards_of(count: int) -> list[tuple[int, int]]:
    """The range [start, stop) of samples in each file of features, for ``count`` samples."""
    batches = -(-count // (FEWEST_SHARDS * NETWORK_BATCH))
    size = min(SHARD_SIZE, batches * NETWORK_BATCH)
    return [(start, min(start + size, count)) for start in range(0, count, size)]
