"""Orders: which samples form which batch on which process, as a function of (seed, epoch, rank) alone.

The batches number ``k`` of all ranks together are one slice of the epoch's order. So a run sees the same images in the
same steps with 1 process of batch size 64 and with 2 of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vistok.draws import Keys


@dataclass(frozen=True)
class ShuffledOrder:
    """Training: a new permutation every epoch, in whole batches; the remainder of an epoch is left out.

    Attributes:
        in_step: whether all processes have the same number of batches, so that none may skip one.

    Raises:
        ValueError: too few samples for one batch, or ``rank`` is not below ``world_size``.
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
    """Training on samples that every epoch draws anew, with replacement; with the batch count of ``ShuffledOrder``."""

    def batches(self, epoch: int) -> np.ndarray:
        shape = (len(self), self.world_size, self.batch_size)
        # A float32 uniform has 24 random bits, too few to reach every sample of a large set; two have 48.
        high, low = Keys(self.seed, (0,), step=epoch).uniform("resampled order", 2, *shape)[0].double().numpy()
        return ((high + low / (1 << 24)) * self.length).astype(np.int64)[:, self.rank]


@dataclass(frozen=True)
class ShardOrder:
    """Every sample of the shards with the numbers ``shards`` once, in order; no batch crosses the end of a shard.

    A shard is ``shard_size`` consecutive samples; the last one may be shorter.
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
