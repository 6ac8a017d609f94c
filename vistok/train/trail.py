"""A record of the last steps, so that a NaN can be traced to its step and samples without waiting for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHOWN = 8
"""How many samples a message names; ``diverged.json`` has all."""


@dataclass(frozen=True)
class Culprit:
    """The first step of a window whose loss or gradient norm is not finite.

    Attributes:
        step: the optimisation step, counted from 1.
        name, value: name of the loss or gradient norm, and its value: "nan", "inf" or "-inf".
        samples: names of the samples of this process's batches in that step.
    """

    step: int
    name: str
    value: str
    samples: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.samples) - SHOWN} more" if len(self.samples) > SHOWN else ""
        return f"{self.name} is {self.value} in step {self.step}, on {', '.join(self.samples[:SHOWN])}{more}"


class Trail:
    """Losses, gradient norms and sample indices of the steps since the last check. Values stay on the device."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._origins: list[tuple[int, str]] = []
        self._indices: dict[int, list[Tensor]] = {}

    def add_batch(self, step: int, indices: Tensor) -> None:
        self._indices.setdefault(step, []).append(indices)

    def add(self, step: int, name: str, value: Tensor) -> None:
        self._values.append(value.detach().float())
        self._origins.append((step, name))

    def check(self, sample_name: Callable[[int], str]) -> Culprit | None:
        """Return the first number that is not finite, if any, and start a new window. It waits for the device once.

        Args:
            sample_name: the name of the sample at an index.
        """
        values, origins, indices = self._values, self._origins, self._indices
        self._values, self._origins, self._indices = [], [], {}
        numbers = torch.stack(values) if values else torch.empty(0)
        bad = (~numbers.isfinite()).nonzero()
        if not len(bad):
            return None
        first = int(bad[0])
        step, name = origins[first]
        samples = tuple(sample_name(index) for index in torch.cat(indices[step]).tolist())
        return Culprit(step, name, str(float(numbers[first])), samples)


def earliest(culprits: Sequence[Culprit | None]) -> list[Culprit]:
    """The culprits of the earliest step, among those of all processes."""
    found = [culprit for culprit in culprits if culprit is not None]
    return [culprit for culprit in found if culprit.step == min(other.step for other in found)]
