"""Several processes that share one piece of work, as ``torchrun`` or ``accelerate launch`` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(days=2)  # how long a process waits for slower ones


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; a single one by default.

    Attributes:
        index: of this process.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Join the processes that the launcher's environment (RANK, WORLD_SIZE) tells of, if there are several."""
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
        """A GPU of its own for every process of a machine, if there are GPUs."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def part(self, count: int) -> tuple[int, int]:
        """First and last + 1 of this process's consecutive share of ``count`` items."""
        return self.index * count // self.count, (self.index + 1) * count // self.count

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, everywhere."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes()


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one; before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def group_size() -> int:
    """How many processes torch's process group has; 1 where there is none."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _SumOverGroup(torch.autograd.Function):
    """Every process has a share in the sum that all get, so its gradient is the sum of all of theirs."""

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

    Differentiable, twice too, for parts of a loss that differ from process to process. All of them must compute
    gradients through it.
    """
    return values if group_size() == 1 else _SumOverGroup.apply(values)


def share_of_group(total: Tensor) -> Tensor:
    """What a weighted mean in a loss divides by, given this process's total of the weights (scalar): the mean of all
    processes' totals, since the mean of their losses is then the mean over all samples, however the weights are spread.

    Where gradients are computed every process must call it. Elsewhere, as in a validation that one process does alone,
    the total stays as it is.
    """
    return mean_over_group(total.detach().float()).to(total) if torch.is_grad_enabled() else total


def mean_over_group(values: Tensor) -> Tensor:
    """The mean of ``values`` (...) over the process group; every process must call it, and gets the same mean.

    Differentiable, for losses that every process computes from the mean alike: each hands the whole gradient of the
    mean on to its own values, and DDP or FSDP2, which average gradients over processes, make it that process's share.
    """
    if group_size() == 1:
        return values
    mean = values.detach().clone()
    distributed.all_reduce(mean)
    return values + (mean / group_size() - values).detach()
