"""Which modules compute what their class says, so that something faster may compute it in their place."""

from __future__ import annotations

from torch import nn


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer as PyTorch has it, with a weight of its own."""
    # A subclass of Parameter is quantised, or sharded over processes.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def is_altered(module: nn.Module) -> bool:
    """Whether more happens in a call, or something else, than the class says: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
