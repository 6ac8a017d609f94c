"""Copies of a module with some layers replaced by equivalent ones; everything else is shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeGuard

from torch import nn


def with_layers(module: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of ``module`` with other layers inside; parameters, buffers and hooks are shared.

    Args:
        other: maps a module to its replacement, to itself to keep it unchanged, or to None to visit its children.

    Returns:
        the copy, or ``module`` itself if nothing in it is replaced.
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
    """Whether the module is an unmodified ``nn.Linear``: no subclass, no hooks, no quantised or sharded weight."""
    # A subclass of Parameter is quantised, or sharded over processes.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_altered(module)


def is_altered(module: nn.Module) -> bool:
    """Whether a call does more than the class's ``forward``: the module has hooks, or a ``forward`` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
