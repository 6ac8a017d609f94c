"""Randomness as a value.

A model never draws from a hidden generator while it computes. It receives its draws: a dictionary of tensors that
are a function of (seed, sample index, step, name) alone. So a seed gives the same sample in every batch, order and
number of processes, and a test can pass its own draws.

The generator is NumPy's Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter
based, the same on every platform. It is too slow for training. There ``Keys.on(device)`` draws on the device with
torch's generator, whose numbers depend on the type of the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

Draws = dict[str, Tensor]
"""Named random tensors, each with the batch as first axis."""


def draws_on(draws: Draws, device: torch.device) -> Draws:
    """The draws on ``device``; the copy to a CUDA device does not wait for its running computation."""
    # CUDA has read pageable CPU memory when the call returns; other devices may read it later, when it is freed.
    return {name: value.to(device, non_blocking=device.type == "cuda") for name, value in draws.items()}


@dataclass(frozen=True)
class Keys:
    """The keys of a batch's randomness: one ``seed``, the global sample ``indices`` of its rows, and a ``step``.

    ``step`` separates uses of the same sample: the optimisation step in training, 0 in sampling.
    """

    seed: int
    indices: tuple[int, ...]
    step: int = 0

    @classmethod
    def range(cls, seed: int, count: int, start: int = 0, step: int = 0) -> Keys:
        """Keys of ``count`` consecutive samples."""
        return cls(seed, tuple(range(start, start + count)), step)

    @classmethod
    def of(cls, seed: int, indices: Iterable[int] | Tensor, step: int = 0) -> Keys:
        return cls(seed, tuple(indices.tolist() if isinstance(indices, Tensor) else map(int, indices)), step)

    def __len__(self) -> int:
        return len(self.indices)

    def on(self, device: torch.device) -> Keys:
        """Keys that draw on ``device``, or on the CPU if torch has no generator for such a device.

        Their numbers differ from those of these keys, but are as independent of batch and processes.
        """
        return DeviceKeys(self.seed, self.indices, self.step, device if device.type in GENERATORS else CPU)

    def at(self, indices: Iterable[int]) -> Self:
        """The same keys for other samples."""
        return replace(self, indices=tuple(map(int, indices)))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform float32 numbers in [0, 1), (B, *shape)."""
        return self._draw(name, lambda rng: rng.random(shape, dtype=np.float32))

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal float32 numbers, (B, *shape)."""
        return self._draw(name, lambda rng: rng.standard_normal(shape, dtype=np.float32))

    def permutation(self, name: str, length: int) -> Tensor:
        """One random order of ``length`` items per sample, (B, length) int64."""
        return self._draw(name, lambda rng: rng.permutation(length))

    def _draw(self, name: str, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        rows = [np.asarray(draw(self._generator(index, name))) for index in self.indices]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0)

    def _generator(self, index: int, name: str) -> np.random.Generator:
        mask = (1 << 64) - 1
        # The first counter word counts; step and name select disjoint streams through the upper words.
        # From lists NumPy would make floats of numbers from 2^63 on, and neighbouring seeds would collide.
        counter = np.array([0, 0, self.step & mask, zlib.crc32(name.encode())], dtype=np.uint64)
        key = np.array([self.seed & mask, index & mask], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


CPU = torch.device("cpu")
GENERATORS = ("cpu", "cuda", "xpu")
"""Types of devices for which torch has a generator that can be seeded."""


@dataclass(frozen=True)
class DeviceKeys(Keys):
    """Keys that draw on a device, for the noise of training: a torch generator is seeded for each sample and name.

    On a CPU torch uses 32 bits of a seed, so two streams are equal with probability 2^-32.
    """

    device: torch.device = CPU

    def uniform(self, name: str, *shape: int) -> Tensor:
        return self._filled(name, shape, torch.float32, Tensor.uniform_)

    def normal(self, name: str, *shape: int) -> Tensor:
        return self._filled(name, shape, torch.float32, Tensor.normal_)

    def permutation(self, name: str, length: int) -> Tensor:
        return self._filled(name, (length,), torch.int64, Tensor.random_).argsort(1)

    def _filled(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[..., Tensor]) -> Tensor:
        rows = torch.empty((len(self), *shape), dtype=dtype, device=self.device)
        generator = torch.Generator(self.device)
        for row, seed in zip(rows.unbind(), self._seeds(name)):
            fill(row, generator=generator.manual_seed(seed))
        return rows

    def _seeds(self, name: str) -> list[int]:
        """A seed per sample, mixed from seed, name, step and sample index."""
        mask = (1 << 64) - 1
        state = np.array([self.seed & mask, zlib.crc32(name.encode()), self.step & mask], dtype=np.uint64)
        indices = np.array([index & mask for index in self.indices], dtype=np.uint64)
        mixed: np.ndarray | np.uint64 = np.uint64(0)
        for value in (*state, indices):
            mixed = _mixed(mixed ^ value)
        return np.atleast_1d(mixed).tolist()


def _mixed(values: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The mixing function of SplitMix64 (Steele et al., OOPSLA 2014): neighbouring numbers become unrelated."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds the uniform number: (B, V), (B,) -> (B,) int64.

    Ids of probability 0 are never drawn. If probabilities are not finite, the id is arbitrary; the caller checks them.
    """
    cumulative = probabilities.cumsum(-1)
    if cumulative.device.type == "cpu":  # a sequential sum, which ids of probability 0 leave unchanged
        ids = torch.searchsorted(cumulative, _threshold(uniforms, cumulative[:, -1:]), right=True).squeeze(-1)
        return ids.clamp_max(probabilities.shape[-1] - 1)  # sums of NaN exceed nothing
    return first_above(cumulative.masked_fill(probabilities == 0, 0), uniforms)


def first_above(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which ``cumulative`` (B, V) exceeds ``uniforms`` (B,) times its maximum; (B,) int64.

    The parallel sums of an accelerator are not monotone to the last bit, so the last is not always the maximum.
    """
    return (cumulative > _threshold(uniforms, cumulative.amax(-1, keepdim=True))).int().argmax(-1)


def _threshold(uniforms: Tensor, total: Tensor) -> Tensor:
    """``uniforms`` times ``total`` (which rounding may leave off 1), (B, 1), kept below ``total``."""
    return torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
