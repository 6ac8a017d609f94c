"""Low-rank adaptation (LoRA, arXiv 2106.09685): few parameters are trained, and the weights stay fixed.

Each weight W (out, in) of the chosen layers becomes ``W + alpha / rank * B A``. A (rank, in) is random and B (out,
rank) is zero at first, so that training begins with the unchanged model (section 4.1). It is a parametrization of
torch, so all code that reads the weight of a layer gets the sum.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vistok.checkpoints import Model
from vistok.checkpoints.adapters import added
from vistok.checkpoints.bounds import OversizedError, check_bytes
from vistok.signatures import ConfigError
from vistok.train.config import LoraConfig
from vistok.train.names import matching


class LowRank(nn.Module):
    """The parametrization that adds a low-rank product to a weight (out, ...)."""

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.register_buffer("scale", weight.new_tensor(alpha / rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # the initialisation of torch's own layers

    def forward(self, weight: Tensor) -> Tensor:
        return added(weight, self.down, self.up, self.scale)


def add_adapters(model: Model, config: LoraConfig) -> set[str]:
    """Add adapters to a model, and return the names of their parameters.

    Raises:
        ConfigError: a pattern fits no layer, the model has no layers for adapters, or the rank needs too much memory.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    layers = {name: layer for name, layer in layers.items() if not parametrize.is_parametrized(layer)}
    if not layers:
        raise ConfigError(f"training.lora: {type(model).__name__} has no linear or convolutional layers")
    chosen = matching(layers, config.targets, "training.lora.targets", "layer")
    sizes = (sum(layers[name].weight.shape[:1]) + layers[name].weight[0].numel() for name in chosen)
    try:
        check_bytes(f"training.lora.rank {config.rank}", 4 * config.rank * sum(sizes))
    except OversizedError as error:
        raise ConfigError(str(error)) from error
    for name in sorted(chosen):
        weight = layers[name].weight
        parametrize.register_parametrization(layers[name], "weight", LowRank(weight, config.rank, config.alpha))
    model.adapter_apart = not config.merge
    return {name for name, _ in model.named_parameters() if ".parametrizations.weight.0." in name}
