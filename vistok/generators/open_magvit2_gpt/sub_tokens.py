"""Sub-tokens: an id of many bits as several ids of fewer bits, which small heads can predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BITS = 62
"""The most bits of an id, as in ``LFQ``."""


@dataclass(frozen=True)
class SubTokens:
    """Splits ids of sum(bits) bits into parts of bits[0], bits[1], ... bits, the lowest first (arXiv 2409.04410,
    section 3.2).

    Raises:
        ValueError: fewer than two parts, a part without bits, or more bits than an id can hold.
    """

    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.bits, list | tuple) or len(self.bits) < 2 or not all(_is_count(n) for n in self.bits):
            raise ValueError(
                f"factorized_bits must be two or more whole numbers of at least 1, got {self.bits}; whole ids take "
                "a generator without sub-tokens"
            )
        if sum(self.bits) > MOST_BITS:
            raise ValueError(f"factorized_bits add up to {sum(self.bits)}, and an id holds {MOST_BITS} bits at most")
        object.__setattr__(self, "bits", tuple(self.bits))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The vocabulary size of each part."""
        return tuple(2**count for count in self.bits)

    def split(self, ids: Tensor) -> list[Tensor]:
        """The parts (...) of ids (...)."""
        parts = []
        for size, count in zip(self.sizes, self.bits):
            parts.append(ids % size)
            ids = ids >> count
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The ids (...) from their parts (...)."""
        ids, shift = torch.zeros_like(parts[0]), 0
        for part, count in zip(parts, self.bits, strict=True):
            ids, shift = ids | (part << shift), shift + count
        return ids


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
