"""Which samples form which batch, on which process: a function of (seed, epoch, rank) alone.

A batch number means the same thing to all processes: number ``k`` of ``world_size`` ranks together is one slice of
the epoch's order. So a run sees the same images in the same steps on 1 x 64 and on 2 x 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vistok.draws import Keys


@dataclass(frozen=True)
class ShuffledOrder:
    """Training: a new permutation every epoch, whole batches only (the remainder of an epoch is left out).

    Attributes:
        in_step: whether all processes have as many batches, so that none may skip one.

    Raises:
        ValueError: there are too few samples for one batch, or ``rank`` is no rank.
    """

    length: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    in_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world_size)
        if len(self) == 0:
            raise ValueError(
                f"{self.length} samples do not fill one batch of {self.batch_size} on {self.world_size} process(es); "
                "lower data.batch_size or add data"
            )

    def __len__(self) -> int:
        """Batches per epoch on each process."""
        return self.length // (self.batch_size * self.world_size)

    def batches(self, epoch: int) -> np.ndarray:
        """Indices of this rank's batches, (batches, batch_size) int64."""
        order = Keys(self.seed, (0,), step=epoch).permutation("epoch order", self.length)[0].numpy()
        whole = order[: len(self) * self.batch_size * self.world_size]
        return whole.reshape(len(self), self.world_size, self.batch_size)[:, self.rank]


@dataclass(frozen=True)
class SequentialOrder:
    """Evaluation: every sample exactly once, in order; the last batch may be short, and ranks may differ by a batch."""

    length: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    in_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world_size)

    def __len__(self) -> int:
        """Batches on this process."""
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Indices of this rank's batches; the same in every ``epoch``."""
        starts = range(self.rank * self.batch_size, self.length, self.batch_size * self.world_size)
        return [np.arange(start, min(start + self.batch_size, self.length)) for start in starts]


@dataclass(frozen=True)
class ResampledOrder(ShuffledOrder):
    """Training on samples drawn with replacement, anew in every epoch; as many batches as ``ShuffledOrder`` has."""

    def batches(self, epoch: int) -> np.ndarray:
        shape = (len(self), self.world_size, self.batch_size)
        # Two numbers of 24 bits each reach every sample of any data set.
        high, low = Keys(self.seed, (0,), step=epoch).uniform("resampled order", 2, *shape)[0].double().numpy()
        return ((high + low / (1 << 24)) * self.length).astype(np.int64)[:, self.rank]


@dataclass(frozen=True)
class ShardOrder:
    """Every sample of some shards once, in order; no batch reaches over the end of a shard.

    A shard is ``shard_size`` consecutive samples, the last one what is left; ``shards`` are their numbers.
    """

    length: int
    batch_size: int
    shards: tuple[int, ...]
    shard_size: int
    seed: int = 0
    world_size: int = 1

    in_step: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Indices of the batches; the same in every ``epoch``."""
        ends = {shard * self.shard_size: min((shard + 1) * self.shard_size, self.length) for shard in self.shards}
        return [
            np.arange(start, min(start + self.batch_size, end))
            for first, end in ends.items()
            for start in range(first, end, self.batch_size)
        ]


Order = ShuffledOrder | SequentialOrder | ShardOrder


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1} (world_size {world_size}), got {rank}")
