"""What is put around a model from outside: activation checkpointing, DDP, and FSDP2 with whole states of models and
optimizers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.checkpoint import checkpoint

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.weights import check_state
from vistok.config import ConfigError
from vistok.train.config import TrainingConfig
from vistok.train.tasks import Task

AUTOCAST_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def wants_fsdp2(training: TrainingConfig, task: Task) -> bool:
    """Whether the config says so, or the run was started by ``accelerate launch --use_fsdp``.

    Raises:
        ConfigError: FSDP2 with something that it cannot be combined with.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if launched and os.environ.get("FSDP_VERSION", "2") != "2":
        raise ConfigError("vistok shards with FSDP2: start it with accelerate launch --use_fsdp --fsdp_version 2")
    if not launched and training.parallel != "fsdp2":
        return False
    if training.mixed_precision == "fp16":
        raise ConfigError("training.mixed_precision=fp16 does not go with FSDP2; use bf16")
    task.check_sharding()
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


def shard(model: nn.Module, device: torch.device, *, mixed_precision: str = "no") -> nn.Module:
    """Spread the parameters of a model over all processes (FSDP2), block by block.

    With ``mixed_precision`` bf16, weights that autocast would turn into bfloat16 anyway are gathered in it, at half the
    traffic, where a block has no others but norms. Everything else, a codebook for one, is gathered as it is, and all
    gradients are added up in float32: the numbers are those of DDP.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    # Inputs are not cast: the residual stream stays in float32.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in repeated_blocks(model):
        block.register_forward_hook(_return_no_views)
        norms = _norms(block)
        if mixed_precision == "bf16" and norms is not None:
            if norms:
                fully_shard(norms, mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=half)
        else:
            fully_shard(block, mesh=mesh)
    model.register_forward_hook(_return_no_views)
    fully_shard(model, mesh=mesh)
    return model


def _norms(block: nn.Module) -> list[nn.Module] | None:
    """The norms of a block, if it has no other weights but those that autocast casts; None if it has, or is frozen.

    Frozen networks may run outside of autocast, in float32.
    """
    layers = [module for module in block.modules() if list(module.parameters(recurse=False))]
    others = [layer for layer in layers if not isinstance(layer, AUTOCAST_LAYERS)]
    trained = all(parameter.requires_grad for parameter in block.parameters())
    return others if trained and all("Norm" in type(layer).__name__ for layer in others) else None


def _return_no_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: outputs that are views are copied. FSDP2 hangs on a module's outputs what its backward pass needs,
    and an operation in place on a view would lose that."""
    return _map_tensors(lambda tensor: tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor, output)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with its tensors replaced, in data classes, dictionaries, tuples and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _map_tensors(function, part) for name, part in vars(value).items()})
    if isinstance(value, dict):
        return {name: _map_tensors(function, part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(function, part) for part in value)
    return value


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip in place; returns the norm before, over all processes where parameters are sharded."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def replicating() -> AbstractContextManager[None]:
    """A context in which sharded tensors (DTensor) compute with plain ones, which must be equal on all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model; if that is sharded, gathered on the CPU of process 0, and empty elsewhere.

    All processes must call it.
    """
    return get_model_state_dict(model, options=_options(model))


def load_whole_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Collection[str] = ()
) -> None:
    """Load a whole state dict, which every process has, into a model that may be sharded.

    Args:
        optional: keys that may be absent from the state; they stay as they are.

    Raises:
        CheckpointError: it does not fit; ``source`` names it in the message.
    """
    check_state(model, state, source=source, optional=optional)
    set_model_state_dict(model, dict(state), options=replace(_options(model), strict=False))


def named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, named: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """What an optimizer remembers of each parameter of a model, by its name in ``named``, gathered as
    ``whole_state_dict`` does it."""
    own, trained = _keys(model), _trained(optimizer)
    state: Any = {}
    if optimizer.state:  # if not, the library would begin it by a step
        state = get_optimizer_state_dict(model, optimizer, options=_options(model)).get("state", {})
    return {name: state.get(own[parameter], {}) for name, parameter in named.items() if parameter in trained}


def load_named_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    state: Mapping[str, Any],
    *,
    fresh: Collection[str] = (),
) -> None:
    """Load what ``named_state`` returned, which every process has, into an optimizer of a model that may be sharded
    otherwise. Rates, decays and groups stay the optimizer's own.

    Args:
        fresh: names of parameters that it need not remember.

    Raises:
        CheckpointError: it is the state of an optimizer of other parameters.
    """
    own, trained = _keys(model), _trained(optimizer)
    parameters = {name: parameter for name, parameter in named.items() if parameter in trained}
    if parameters.keys() - set(fresh) != state.keys():
        raise CheckpointError("the checkpoint's optimizer trains other parameters than this run's; start a new run")
    saved: Any = {own[parameters[name]]: dict(values) for name, values in state.items() if values}
    if saved:
        kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        options = replace(_options(model), strict=False)
        set_optimizer_state_dict(model, optimizer, {"state": saved, "param_groups": groups}, options=options)
        for group, own_values in zip(optimizer.param_groups, kept, strict=True):
            group.update(own_values)  # the library makes lists of tuples
    for name, parameter in parameters.items():
        if not state.get(name):
            optimizer.state.pop(parameter, None)  # the library has begun it


def _options(model: nn.Module) -> StateDictOptions:
    from torch.distributed.fsdp import FSDPModule

    return StateDictOptions(full_state_dict=True, cpu_offload=isinstance(model, FSDPModule))


def _keys(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: key for key, parameter in model.named_parameters()}


def _trained(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
