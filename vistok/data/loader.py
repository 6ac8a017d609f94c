"""Batches that do not depend on the number of workers, and that resume in the middle of an epoch.

A :class:`Loader` joins an order (which indices, :mod:`vistok.data.order`) with a batch reader (the samples at these
indices): images and clips here, cached tokens in :mod:`vistok.data.tokens`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vistok.data.batches import Failures, ImageBatch
from vistok.data.clip_sources import ClipSource, InMemoryClips
from vistok.data.clips import ClipBatches, ClipTransform
from vistok.data.config import DataConfig
from vistok.data.decoded_clips import DecodedClips
from vistok.data.image_batches import ImageBatches, InMemory
from vistok.data.order import Order, ResampledOrder, SequentialOrder, ShuffledOrder
from vistok.data.sources import ImageSource
from vistok.data.targets import paired
from vistok.data.transforms import ImageTransform
from vistok.data.workers import cause_of_death, end_with_the_parent, leave_signals_to_the_parent

log = logging.getLogger(__name__)

MAX_UNREADABLE_SHARE = 0.01
SHOWN = 20
"""How many unreadable samples a message names."""


class Indexed(Protocol):
    """A batch that knows its samples' indices (B,)."""

    @property
    def indices(self) -> Any: ...


B = TypeVar("B", bound=Indexed)
Batch_co = TypeVar("Batch_co", bound=Indexed, covariant=True)


class BatchReader(Protocol[Batch_co]):
    """Samples that are read a batch at a time."""

    def __len__(self) -> int: ...

    def load(self, indices: np.ndarray, epoch: int) -> tuple[Batch_co, Failures]:
        """Read the samples at ``indices`` (B,), with the augmentation of ``epoch``. Unreadable ones are left out."""


class TooManyUnreadableError(ValueError):
    """More than 1 % of a source cannot be read."""


def check_failures(failures: Failures, count: int) -> None:
    """Raise TooManyUnreadableError, which lists the failures, if they are more than 1 % of ``count`` samples."""
    if len(failures) > MAX_UNREADABLE_SHARE * count:
        raise TooManyUnreadableError(
            f"{len(failures)} of {count} samples cannot be read, more than {MAX_UNREADABLE_SHARE:.0%}; "
            f"repair or remove them:\n{listed(failures)}"
        )


def listed(failures: Failures) -> str:
    """The first failures in the order of the source, one per line."""
    reasons = [failures[index] for index in sorted(failures)]
    return "\n".join(reasons[:SHOWN] + ["…"] * (len(reasons) > SHOWN))


class Loader(Generic[B]):
    """Iterates over the batches of one epoch after another; one ``iter`` is one epoch.

    ``state_dict`` says which batch comes next, and after ``load_state_dict`` the next ``iter`` starts there; batches
    that workers have read ahead do not count. Any other ``iter`` starts its epoch anew, so a loop that breaks off and
    begins again sees the same batches.

    A sample that cannot be read is left out of its batch (which is then smaller), and named in a warning the first
    time. It is not replaced, so that the contents of a batch never depend on the run's history. A batch without any
    sample is skipped; if processes must stay in step (``Order.in_step``), the next readable batch is used twice
    instead.

    Raises:
        TooManyUnreadableError: while iterating, once more than 1 % of all samples were unreadable.
    """

    def __init__(self, reader: BatchReader[B], order: Order, *, num_workers: int = 0, epoch: int = 0) -> None:
        if len(reader) != order.length:
            raise ValueError(f"the order is for {order.length} samples, but there are {len(reader)}")
        self.reader, self.order, self.epoch = reader, order, epoch
        self._position = 0  # batches of this epoch that were handed out
        self._start = 0  # where the next iter begins
        self._failures: Failures = {}
        # Refilled at every iteration. (A sampler that refers to this loader would close a reference cycle. Workers
        # would then be collected in a bad order, and torch would wait 5 s for each.)
        self._requests: list[tuple[int, np.ndarray]] = []
        self._loader = DataLoader(
            _WholeBatches(reader),
            sampler=self._requests,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
        )
        end_with_the_parent(self._loader)

    def __len__(self) -> int:
        """Batches per epoch, on this process."""
        return len(self.order)

    def __iter__(self) -> Iterator[B]:
        self._position, self._start = self._start, 0
        requests = [(self.epoch, indices) for indices in self.order.batches(self.epoch)]
        self._requests[:] = requests[self._position :]
        for batch, failures in self._loader:
            self._position += 1
            self._report(failures)
            if not len(batch.indices) and self.order.in_step:
                batch = self._next_readable(requests[self._position :] + requests[: self._position])
            if len(batch.indices):
                yield batch
        self.epoch += 1
        self._position = 0

    def _next_readable(self, requests: list[tuple[int, np.ndarray]]) -> B:
        """The first batch that has a sample; the last request is the batch that had none."""
        for epoch, indices in requests:
            batch, failures = self.reader.load(indices, epoch)
            self._report(failures)
            if len(batch.indices):
                break
        return batch

    @property
    def failures(self) -> Failures:
        """The samples that could not be read so far, and were left out."""
        return dict(self._failures)

    def count_failures(self, failures: Failures) -> None:
        """Add the samples that other processes could not read to ``failures``.

        Raises:
            TooManyUnreadableError: all failures together are more than 1 % of the samples.
        """
        self._failures.update(failures)
        check_failures(self._failures, len(self.reader))

    def dead_worker(self) -> str | None:
        """Which worker died, and of what; None if none did. Call it after an error: torch raises the death of a worker
        anywhere in the main thread."""
        return cause_of_death(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The position of the iteration, and the failures so far, as plain numbers and texts."""
        finished = self._position == len(self)
        return {
            "epoch": self.epoch + finished,
            "position": 0 if finished else max(self._position, self._start),
            "failures": self.failures,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of ``state``.

        The number of workers may differ; so may the number of processes, if the global batch size is the same.

        Raises:
            ValueError: the state belongs to other data, another seed or another global batch size.
        """
        for key, own in self._identity().items():
            if state[key] != own:
                raise ValueError(f"cannot resume the data order: {key} was {state[key]!r}, now {own!r}")
        failures = dict(state["failures"])
        if not all(isinstance(index, int) and isinstance(reason, str) for index, reason in failures.items()):
            raise TypeError("the samples that could not be read have no reasons")
        self.epoch, self._start, self._position = state["epoch"], state["position"], 0
        self._failures = failures

    def _identity(self) -> dict[str, int]:
        order = self.order
        return {
            "samples": order.length,
            "seed": order.seed,
            "global_batch_size": order.batch_size * order.world_size,
        }

    def _report(self, failures: Failures) -> None:
        for index, reason in failures.items():
            if index not in self._failures:
                log.warning("left out, cannot be read: %s", reason)
        self.count_failures(failures)


class _Nothing:
    """The batch reader of a data set without samples."""

    def __len__(self) -> int:
        return 0

    def load(self, indices: np.ndarray, epoch: int) -> tuple[Any, Failures]:
        raise IndexError(f"there are no samples, and so none at {indices}")


def no_samples() -> Loader[Any]:
    """A loader without samples: every epoch is empty."""
    return Loader(_Nothing(), SequentialOrder(0, 1))


Source = ImageSource | ClipSource


def training_loader(source: Source, config: DataConfig, *, rank: int = 0, world_size: int = 1) -> Loader[ImageBatch]:
    """Augmented whole batches in a random order; ``config.batch_size`` is per process."""
    kind = ResampledOrder if config.order == "resampled" else ShuffledOrder
    order = kind(len(source), config.batch_size, config.seed, rank, world_size)
    return _loader(source, order, config, augmented=True)


def evaluation_loader(source: Source, config: DataConfig, *, rank: int = 0, world_size: int = 1) -> Loader[ImageBatch]:
    """Every image or clip once, in order, without augmentation."""
    order = SequentialOrder(len(source), config.batch_size, config.seed, rank, world_size)
    return _loader(source, order, config, augmented=False)


def augmented_view_loader(source: Source, config: DataConfig, view: int) -> Loader[ImageBatch]:
    """Every image or clip once, in order, with the augmentation of training epoch ``view``: one view of a token
    cache."""
    order = SequentialOrder(len(source), config.batch_size, config.seed)
    return _loader(source, order, config, augmented=True, epoch=view)


def _loader(source: Source, order: Order, config: DataConfig, *, augmented: bool, epoch: int = 0) -> Loader[ImageBatch]:
    source = cached(source, config, augmented=augmented)
    reader = batch_reader(source, config, augmented=augmented)
    return Loader(reader, order, num_workers=config.num_workers, epoch=epoch)


def cached(source: Source, config: DataConfig, *, augmented: bool) -> Source:
    """The source, kept in memory or on disk if ``config.cache`` says so."""
    if config.cache == "none" or isinstance(source, InMemory | InMemoryClips | DecodedClips):
        return source
    if not isinstance(source, ClipSource):
        return InMemory(source, _image_transform(config, augmented=augmented))
    return (
        InMemoryClips(source)
        if config.cache == "memory"
        else DecodedClips(source, _clip_transform(config, augmented=False))
    )


def batch_reader(source: Source, config: DataConfig, *, augmented: bool) -> ImageBatches | ClipBatches:
    """The reader of a source's images or clips, with or without the config's augmentation."""
    if isinstance(source, ClipSource):
        return ClipBatches(source, _clip_transform(config, augmented=augmented), seed=config.seed)
    transform = _image_transform(config, augmented=augmented)
    if config.target_root is None:
        return ImageBatches(source, transform, seed=config.seed)
    return paired(source, config, transform)


def _image_transform(config: DataConfig, *, augmented: bool) -> ImageTransform:
    transform = ImageTransform(config.image_size, config.crop, config.flip, config.affine)
    return transform if augmented else transform.without_augmentation()


def _clip_transform(config: DataConfig, *, augmented: bool) -> ClipTransform:
    if config.num_frames is None:
        raise ValueError("clips need data.num_frames=…")
    transform = ClipTransform(
        config.num_frames,
        config.image_size,
        config.frame_stride,
        start=config.clip_start,
        short=config.short_clips,
        crop=cast(Any, config.crop),  # ClipTransform refuses the crops that clips do not have
        flip=config.flip,
        channels=config.channels,
    )
    return transform if augmented else transform.without_augmentation()


class _WholeBatches(Dataset):
    """The dataset of the workers; one item is a whole batch."""

    def __init__(self, reader: BatchReader[Any]) -> None:
        self.reader = reader

    def __getitem__(self, request: tuple[int, np.ndarray]) -> tuple[tuple, Failures]:
        epoch, indices = request
        return self.reader.load(indices, epoch)


def _unchanged(item: Any) -> Any:
    return item
