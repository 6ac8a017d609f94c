"""Batch norm over the batch of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistok.utils.processes import group_size, sum_over_group


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d, except that in training the statistics are taken over the batches of all processes.

    Several processes thus compute what one process computes on the whole batch. (torch.nn.SyncBatchNorm does not run on
    a CPU.)
    """

    momentum: float
    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or group_size() == 1:
            return super().forward(input)
        x = input.float()
        count = sum_over_group(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = sum_over_group(x.sum((0, 2, 3))) / count  # (C,)
        centred = x - mean[:, None, None]
        variance = sum_over_group(centred.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        normed = centred * (variance + self.eps).rsqrt()[:, None, None]
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
