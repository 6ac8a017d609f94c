"""Randomness as a value.

A model never draws from a hidden generator while it computes. It is handed its draws: a dictionary of tensors that
are a function of (seed, sample index, step, name) alone. So one seed gives one sample, whatever the batch it lies
in, the order, or the number of processes; and a test passes the draws it wants.

The generator is NumPy's Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter
based, the same on every platform. Training draws too much for that: ``Keys.on(device)`` draws on the device, by torch's
generator, whose numbers are those of the device's type.
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
    """The draws on ``device``, copied without waiting for what it is computing."""
    # CUDA reads the memory of the CPU before it returns; other devices may come back for it when it is gone.
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
        """Keys that draw on ``device``, or on the CPU where torch has no generator for such a device. They draw other
        numbers than these keys, which depend on batch and processes as little."""
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
        # The first counter word runs; step and name select disjoint streams through the upper words.
        # As lists, numbers from 2^63 on would turn into floats, and neighbouring seeds into one.
        counter = np.array([0, 0, self.step & mask, zlib.crc32(name.encode())], dtype=np.uint64)
        key = np.array([self.seed & mask, index & mask], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


CPU = torch.device("cpu")
GENERATORS = ("cpu", "cuda", "xpu")
"""Types of devices that torch can seed a generator for."""


@dataclass(frozen=True)
class DeviceKeys(Keys):
    """Keys whose draws are made where they are needed, for the noise of training: a torch generator is seeded for each
    sample and name.

    On a CPU torch takes 32 bits of a seed: two streams are the same with a probability of 2^-32.
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
        """One per sample, mixed from all that a draw depends on."""
        mask = (1 << 64) - 1
        state = np.array([self.seed & mask, zlib.crc32(name.encode()), self.step & mask], dtype=np.uint64)
        indices = np.array([index & mask for index in self.indices], dtype=np.uint64)
        mixed: np.ndarray | np.uint64 = np.uint64(0)
        for value in (*state, indices):
            mixed = _mixed(mixed ^ value)
        return np.atleast_1d(mixed).tolist()


def _mixed(values: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """SplitMix64's function of 64-bit numbers (Steele et al., OOPSLA 2014): neighbours become unrelated."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds the uniform number: (B, V), (B,) -> (B,) int64.

    Ids of probability 0 are never drawn. Probabilities that are not finite give an arbitrary id: whoever calls checks
    them.
    """
    cumulative = probabilities.cumsum(-1)
    if cumulative.device.type == "cpu":  # one running sum: ids of probability 0 do not raise it
        ids = torch.searchsorted(cumulative, _threshold(uniforms, cumulative[:, -1:]), right=True).squeeze(-1)
        return ids.clamp_max(probabilities.shape[-1] - 1)  # no sum of NaN exceeds anything
    return first_above(cumulative.masked_fill(probabilities == 0, 0), uniforms)


def first_above(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first place where (B, V) exceeds the uniform (B,) times its largest value.

    An accelerator's parallel sums are not monotone to the last bit, so their last is not their largest.
    """
    return (cumulative > _threshold(uniforms, cumulative.amax(-1, keepdim=True))).int().argmax(-1)


def _threshold(uniforms: Tensor, total: Tensor) -> Tensor:
    """(B, 1), always below the total: rounding may leave that off 1, and the product equal to it."""
    return torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
