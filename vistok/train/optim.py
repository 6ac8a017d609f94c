"""Optimizers, learning-rate schedules, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vistok.checkpoints import CheckpointError
from vistok.train.config import OptimizerConfig, SchedulerConfig
from vistok.train.parallel import local, spread, whole


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Adam(W) in which vectors and scalars (norms, biases) are not decayed."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind([g for g in groups if g["params"]], lr=lr, betas=config.betas, eps=config.eps)


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer of ``model``, with names of parameters in place of numbers, gathered by ``whole``."""
    names, state = _names(optimizer, model), optimizer.state_dict()
    return {
        "state": {
            names[number]: {key: whole(value) for key, value in moments.items()}
            for number, moments in state["state"].items()
        },
        "param_groups": [group | {"params": [names[n] for n in group["params"]]} for group in state["param_groups"]],
    }


def load_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what ``named_state`` returned, into an optimizer whose model may be sharded otherwise.

    Raises:
        CheckpointError: it is the state of an optimizer of other parameters.
    """
    names, parameters = _names(optimizer, model), dict(model.named_parameters())
    if names != [name for group in state["param_groups"] for name in group["params"]]:
        raise CheckpointError("the checkpoint's optimizer trains other parameters than this run's; start a new run")
    numbers = {name: number for number, name in enumerate(names)}
    optimizer.load_state_dict(
        {
            "state": {
                numbers[name]: {key: spread(value, parameters[name]) for key, value in moments.items()}
                for name, moments in state["state"].items()
            },
            "param_groups": [
                group | {"params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
            ],
        }
    )


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def lr_factor(config: SchedulerConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step 0 .. max_steps - 1; the last one's is ``final_factor``."""
    last = max_steps - 1

    def shape(step: int) -> float:
        progress = (step - config.warmup_steps) / max(last - config.warmup_steps, 1)
        if config.name == "cosine":
            return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.name == "wsd":
            tail = min((1 - step / max(last, 1)) / config.decay_share, 1.0)
            tail = tail if config.decay_shape == "linear" else 1 - math.sqrt(1 - tail)
            return config.final_factor + (1 - config.final_factor) * tail
        return 1.0

    def rise(step: int) -> float:
        if config.warmup_from is None:
            # Step 0 already learns: a factor of exactly zero would waste it.
            return (step + 1) / (config.warmup_steps + 1)
        return config.warmup_from + (1 - config.warmup_from) * step / config.warmup_steps

    return lambda step: rise(step) if step < config.warmup_steps else shape(step)


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
