"""Processes that share work, started by ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(days=2)  # timeout for waiting on slower processes


@dataclass(frozen=True)
class Processes:
    """This process among those that share work; by default a single one.

    Attributes:
        index: rank of this process.
        count: number of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Join the process group that the launcher describes (RANK, WORLD_SIZE), if it has several processes."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not torch.distributed.is_initialized():
            # Only small Python objects and CPU tensors are exchanged, whatever device the models are on.
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(int(os.environ["RANK"]), count)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def device(self) -> torch.device:
        """The GPU of this process, by LOCAL_RANK; the CPU if there are no GPUs."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def ranges(self, count: int, size: int) -> list[tuple[int, int]]:
        """The ranges [start, stop) of at most ``size`` of ``count`` samples that this process makes, in turn with the
        others.

        They depend on the numbers alone, since processes that continue a folder look for its files at different times.
        """
        starts = range(self.index * size, count, self.count * size)
        return [(start, min(start + size, count)) for start in starts]

    def part(self, count: int) -> tuple[int, int]:
        """(start, stop) of this process's consecutive share of ``count`` items."""
        return self.index * count // self.count, (self.index + 1) * count // self.count

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in rank order; every process gets them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes()


def is_first_process() -> bool:
    """Whether this is the launcher's first process or the only one; works before ``Processes.join``."""
    return os.environ.get("RANK", "0") == "0"


def group_size() -> int:
    """Number of processes in torch's process group; 1 if there is none."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _SumOverGroup(torch.autograd.Function):
    """All-reduce sum. Every process gets the sum, so its values' gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverGroup.apply(gradient.contiguous())


def sum_over_group(values: Tensor) -> Tensor:
    """The sum of ``values`` (...) over the process group; every process must call it, and gets the same sum.

    Differentiable, also twice, for parts of a loss that differ between processes. All processes must then run the
    backward pass through it.
    """
    return values if group_size() == 1 else _SumOverGroup.apply(values)


def share_of_group(total: Tensor) -> Tensor:
    """The divisor of a weighted mean in a loss, from this process's scalar ``total`` of the weights.

    It is the mean of all processes' totals. The mean of the processes' losses is then the weighted mean over all
    samples, however the weights are spread. With gradients enabled every process must call it. Without gradients, as in
    a validation on one process, ``total`` is returned.
    """
    return mean_over_group(total.detach().float()).to(total) if torch.is_grad_enabled() else total


def mean_over_group(values: Tensor) -> Tensor:
    """The mean of ``values`` (...) over the process group; every process must call it, and gets the same mean.

    Differentiable, for losses that every process computes identically from the mean: the whole gradient of the mean
    flows to the process's own values, and DDP or FSDP2 then average it over processes.
    """
    if group_size() == 1:
        return values
    mean = values.detach().clone()
    distributed.all_reduce(mean)
    return values + (mean / group_size() - values).detach()
