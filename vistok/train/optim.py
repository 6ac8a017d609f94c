"""Optimizers, learning-rate schedules, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from vistok.train.config import OptimizerConfig, SchedulerConfig
from vistok.train.parallel import local


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Adam(W) in which vectors and scalars (norms, biases) are not decayed."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind([g for g in groups if g["params"]], lr=lr, betas=config.betas, eps=config.eps)


def lr_factor(config: SchedulerConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step 0 .. max_steps - 1; the last one's is ``final_factor``."""
    last = max_steps - 1

    def shape(step: int) -> float:
        progress = (step - config.warmup_steps) / max(last - config.warmup_steps, 1)
        if config.name == "cosine":
            return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.name == "wsd":
            tail = min((1 - step / max(last, 1)) / config.decay_share, 1.0)
            return config.final_factor + (1 - config.final_factor) * tail
        return 1.0

    # Step 0 already learns: a factor of exactly zero would waste it.
    return lambda step: (step + 1) / (config.warmup_steps + 1) if step < config.warmup_steps else shape(step)


class AveragedModel:
    """Exponential moving average of a model's parameters; buffers are copied.

    The decay starts low, (1 + n) / (10 + n) at update n, so that the initial weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = [local(p.detach()) for p in self.model.parameters()]
        torch._foreach_lerp_(own, [local(p.detach()) for p in model.parameters()], 1 - decay)
        for own, other in zip(self.model.buffers(), model.buffers()):
            own.copy_(other)
