"""Optimizers, learning-rate schedules, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from vistok.checkpoints import Model
from vistok.signatures import ConfigError
from vistok.train.config import OptimizerConfig, SchedulerConfig
from vistok.train.names import matching
from vistok.train.parallel import local


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW for named parameters, with a group per learning rate and weight decay; frozen ones are left out.

    Raises:
        ConfigError: a pattern matches no name, or all parameters are frozen.
    """
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not named:
        raise ConfigError("there is nothing to train: every parameter is frozen")
    names = [name for name, _ in named]
    undecayed = matching(names, config.no_decay, "optimizer.no_decay")
    own = [matching(names, group.parameters, "optimizer.groups") for group in config.groups]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in sorted(named, key=lambda item: item[1].ndim < 2):  # stable: matrices first
        decays = name not in undecayed and (config.decayed == "all" or parameter.ndim >= 2)
        lr, weight_decay = config.lr, config.weight_decay if decays else 0.0
        for group, members in zip(config.groups, own):
            if name in members:
                lr = lr if group.lr is None else group.lr
                weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
        groups.setdefault((lr, weight_decay), []).append(parameter)
    sections = [
        {
            "params": members,
            "lr": lr,
            "initial_lr": lr,
            "weight_decay": weight_decay,
            "initial_weight_decay": weight_decay,
        }
        for (lr, weight_decay), members in groups.items()
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(sections, lr=config.lr, betas=config.betas, eps=config.eps)


TAILS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""The shapes of wsd's decay, from 1 to 0 by the share of it that is over; see ``SchedulerConfig.decay_shape``."""


def lr_factor(config: SchedulerConfig, max_steps: int, lr: float = 1.0) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step, 0 .. max_steps - 1.

    Args:
        lr: the peak rate, which turns ``final_lr`` into a factor.
    """
    last, warmup = max_steps - 1 - config.start_step, config.warmup_steps
    final = config.final_lr / lr if config.final_lr else config.final_factor

    def shape(step: int) -> float:
        progress = (step - warmup) / max(last - warmup, 1)
        if config.name == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.name == "wsd":
            left = min((1 - step / max(last, 1)) / config.decay_share, 1.0)
            return final + (1 - final) * TAILS[config.decay_shape](1 - left)
        if config.name in ("linear", "exponential"):
            left = min((1 - progress) / (1 - config.hold), 1.0)
            return final + (1 - final) * left if config.name == "linear" else final ** (1 - left)
        if config.name == "bent":
            knee = (2 - (1 - final) * config.bend) / 2
            if progress < config.bend:
                return 1 - (1 - knee) * progress / config.bend
            return final + (knee - final) * (1 - progress) / (1 - config.bend)
        return config.step_factor ** sum(step >= milestone for milestone in config.milestones)

    def rise(step: int) -> float:
        if config.warmup_from is None:  # a factor of zero would waste step 0
            return (step + 1) / (warmup + 1)
        return config.warmup_from + (1 - config.warmup_from) * step / warmup

    def factor(step: int) -> float:
        step = max(step - config.start_step, 0)
        return rise(step) if step < warmup else shape(step)

    return factor


def decay_factor(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on weight decays as a function of the step, 0 .. max_steps - 1.

    It goes from 1 to ``final_weight_decay / weight_decay`` along half a cosine.
    """
    if config.final_weight_decay is None:
        return lambda step: 1.0
    last = config.final_weight_decay / config.weight_decay
    return lambda step: last + (1 - last) * 0.5 * (1 + math.cos(math.pi * step / max(max_steps - 1, 1)))


class AveragedModel:
    """Exponential moving average (EMA) of a model's parameters; buffers are copied.

    The decay is at most (1 + n) / (10 + n) at update n, so that the initial weights are soon forgotten.
    """

    def __init__(self, model: Model, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Start the average anew at the weights of a model."""
        self.updates = 0
        for own, other in zip(self.model.parameters(), model.parameters()):
            local(own).copy_(local(other.detach()))
        self._copy_buffers(model)

    def _copy_buffers(self, model: nn.Module) -> None:
        for own, other in zip(self.model.buffers(), model.buffers()):
            own.copy_(other)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = [local(p.detach()) for p in self.model.parameters()]
        torch._foreach_lerp_(own, [local(p.detach()) for p in model.parameters()], 1 - decay)
        self._copy_buffers(model)
