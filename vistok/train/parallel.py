"""What is put around a model from outside: activation checkpointing, DDP, and FSDP2 with its whole state dicts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.config import ConfigError
from vistok.train.config import RunConfig


def wants_fsdp2(run: RunConfig) -> bool:
    """Whether the config says so, or the run was started by ``accelerate launch --use_fsdp``.

    Raises:
        ConfigError: FSDP2 with something that it cannot be combined with.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if launched and os.environ.get("FSDP_VERSION", "2") != "2":
        raise ConfigError("vistok shards with FSDP2: start it with accelerate launch --use_fsdp --fsdp_version 2")
    if not launched and run.training.parallel != "fsdp2":
        return False
    if run.training.mixed_precision == "fp16":
        raise ConfigError("training.mixed_precision=fp16 does not go with FSDP2; use bf16")
    if run.losses.get("gan", {}).get("balance") == "adaptive":
        raise ConfigError("losses.gan.balance=adaptive reads a whole weight, which FSDP2 shards; use fixed, or DDP")
    return True


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The units that a model repeats: outermost modules whose class is called ...Block (diffusers: ...Block2D)."""
    if type(model).__name__.removesuffix("2D").endswith("Block"):
        return [model]
    return [block for child in model.children() for block in repeated_blocks(child)]


def checkpoint_activations(model: nn.Module) -> None:
    """Let every block keep its input only, and compute the rest again for the gradient (arXiv 1604.06174).

    Copies of the model must be made before: a later copy would call the blocks of the original.

    Raises:
        ConfigError: the model has no blocks.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(f"training.activation_checkpointing: {type(model).__name__} has no repeated blocks")
    for block in blocks:
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread the parameters of a model over all processes (FSDP2), block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip in place; returns the norm before, over all processes where parameters are sharded."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def replicating() -> AbstractContextManager[None]:
    """Meanwhile sharded tensors can compute with plain ones, which every process must have alike."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded model, gathered on process 0 (empty elsewhere); all processes must call it."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_whole())


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Likewise of its optimizer, by parameter name."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=_whole())


def load_whole_state(
    model: nn.Module, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None, moments: Any = None
) -> None:
    """Load whole state dicts, present on every process, into a sharded model and its optimizer."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    set_model_state_dict(model, state, options=_whole())
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, moments, options=_whole())


def _whole():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)
