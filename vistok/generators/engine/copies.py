"""Copies of a module that compute the same by other layers, and share all else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeGuard

from torch import nn


def with_layers(module: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of ``module`` with other layers inside; parameters, buffers and hooks are shared.

    Args:
        other: what takes the place of a module: a layer, the module itself to leave all of it as it is, or None to look
            at its children.

    Returns:
        ``module`` itself, if nothing in it is replaced.
    """
    layer = other(module)
    if layer is not None:
        return layer
    children = {name: with_layers(child, other) for name, child in module.named_children()}
    if all(children[name] is child for name, child in module.named_children()):
        return module
    like = copy.copy(module)
    like._modules = {**module._modules, **children}
    return like


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer as PyTorch has it, which does no more in a call than multiply."""
    # A subclass of Parameter is quantised, or sharded over processes.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_altered(module)


def is_altered(module: nn.Module) -> bool:
    """Whether a call does other than the class's ``forward``: the module has hooks, or a ``forward`` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
