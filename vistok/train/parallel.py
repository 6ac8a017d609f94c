"""Activation checkpointing and FSDP2 around a model, and whole states of sharded models and optimizers."""

from __future__ import annotations

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
from vistok.signatures import ConfigError
from vistok.train.config import TrainingConfig
from vistok.train.tasks import Task

AUTOCAST_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def wants_fsdp2(training: TrainingConfig, task: Task) -> bool:
    """Whether to use FSDP2: the config says so, or the run was started by ``accelerate launch --use_fsdp``.

    Raises:
        ConfigError: FSDP version 1, or an option that does not work with FSDP2.
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
    """The outermost blocks of a model: modules whose class name ends in Block (in diffusers, Block2D)."""
    if type(model).__name__.removesuffix("2D").endswith("Block"):
        return [model]
    return [block for child in model.children() for block in repeated_blocks(child)]


def checkpoint_activations(model: nn.Module) -> None:
    """Make every block keep only its input, and recompute its activations in the backward pass (arXiv 1604.06174).

    Each block gets a subclass of its class, as in FSDP2's ``fully_shard``, so that the names of its parameters stay as
    they are and copies of the model call their own blocks.

    Raises:
        ConfigError: the model has no blocks.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(f"training.activation_checkpointing: {type(model).__name__} has no repeated blocks")
    # The name stays, because ``repeated_blocks`` finds blocks by it.
    kinds = {kind: type(kind.__name__, (_Recomputing, kind), {}) for kind in map(type, blocks)}
    for block in dict.fromkeys(blocks):
        block.__class__ = kinds[type(block)]


class _Recomputing(nn.Module):
    """The first base of blocks that recompute their activations."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def shard(model: nn.Module, device: torch.device, *, mixed_precision: str = "no") -> nn.Module:
    """Shard the parameters of a model over all processes (FSDP2), block by block.

    With ``mixed_precision`` bf16, weights that autocast would cast anyway are gathered in bfloat16, at half the
    traffic, in blocks whose other weights are all norms. All other weights, such as a codebook, keep their dtype, and
    gradients are reduced in float32. So the numbers are those of DDP.
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
    """The norms of a block, if all its other weights are cast by autocast; None if not, or if some are frozen.

    Frozen networks may run outside of autocast, in float32.
    """
    layers = [module for module in block.modules() if list(module.parameters(recurse=False))]
    others = [layer for layer in layers if not isinstance(layer, AUTOCAST_LAYERS)]
    trained = all(parameter.requires_grad for parameter in block.parameters())
    return others if trained and all("Norm" in type(layer).__name__ for layer in others) else None


def _return_no_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that copies outputs that are views. FSDP2 attaches its backward hooks to a module's outputs, and an
    in-place operation on a view would lose them."""
    return _map_tensors(lambda tensor: tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor, output)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensors, in dataclasses, dictionaries, tuples and lists."""
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
    """Clip gradients in place, and return their norm before; for sharded parameters it is the norm over all
    processes."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor) on this process, sharing its memory; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def replicating() -> AbstractContextManager[None]:
    """A context in which DTensors can be combined with plain tensors, which must be equal on all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The whole state dict of a model; of a sharded model, on the CPU of process 0, and empty on the others.

    All processes must call it.
    """
    return get_model_state_dict(model, options=_options(model))


def load_whole_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Collection[str] = ()
) -> None:
    """Load a whole state dict, which every process has, into a model that may be sharded.

    Args:
        source: names the state in messages.
        optional: keys that the state may lack; the model's own values stay.

    Raises:
        CheckpointError: the state does not fit the model.
    """
    check_state(model, state, source=source, optional=optional)
    set_model_state_dict(model, dict(state), options=replace(_options(model), strict=False))


def named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, named: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """The optimizer state of each trained parameter, by its name in ``named``; gathered as by ``whole_state_dict``."""
    own, trained = _keys(model), _trained(optimizer)
    state: Any = {}
    if optimizer.state:  # torch would initialise an empty state by an optimizer step
        state = get_optimizer_state_dict(model, optimizer, options=_options(model)).get("state", {})
    return {name: state.get(own[parameter], {}) for name, parameter in named.items() if parameter in trained}


def _check_moments(state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise CheckpointError unless a state holds Adam's step and moments of each parameter, or nothing of it."""
    for name, values in state.items():
        shape = tuple(parameters[name].shape)
        shapes: dict[str, tuple[int, ...]] = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        if not isinstance(values, Mapping) or (values and values.keys() != shapes.keys()):
            raise CheckpointError(f"the checkpoint's optimizer has not {', '.join(shapes)} of {name}")
        for key, value in values.items():
            sound = isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
            if not sound or tuple(value.shape) != shapes[key] or not bool(value.isfinite().all()):
                raise CheckpointError(f"the checkpoint's optimizer has no finite {key} {shapes[key]} of {name}")


def load_named_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    state: Mapping[str, Any],
    *,
    fresh: Collection[str] = (),
) -> None:
    """Load the result of ``named_state``, which every process has, into the optimizer of a model.

    The model may be sharded in another way than the saved one. Learning rates, weight decays and groups stay those of
    the optimizer.

    Args:
        fresh: names of parameters that the state may lack.

    Raises:
        CheckpointError: the state is that of other parameters.
    """
    own, trained = _keys(model), _trained(optimizer)
    parameters = {name: parameter for name, parameter in named.items() if parameter in trained}
    if parameters.keys() - set(fresh) != state.keys():
        raise CheckpointError("the checkpoint's optimizer trains other parameters than this run's; start a new run")
    _check_moments(state, parameters)
    saved: Any = {own[parameters[name]]: dict(values) for name, values in state.items() if values}
    if saved:
        kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        if absent := [own[parameters[name]] for name in parameters if not state.get(name)]:
            # torch up to 2.9 wants a state for every parameter: the one that it initialises, which is dropped below
            whole = StateDictOptions(full_state_dict=True)
            initial: Any = get_optimizer_state_dict(model, optimizer, options=whole)["state"]
            saved |= {key: initial[key] for key in absent if key in initial}
        options = replace(_options(model), strict=False)
        set_optimizer_state_dict(model, optimizer, {"state": saved, "param_groups": groups}, options=options)
        for group, own_values in zip(optimizer.param_groups, kept, strict=True):
            group.update(own_values)  # torch turns tuples into lists
    for name, parameter in parameters.items():
        if not state.get(name):
            optimizer.state.pop(parameter, None)  # torch has initialised it


def _options(model: nn.Module) -> StateDictOptions:
    from torch.distributed.fsdp import FSDPModule

    return StateDictOptions(full_state_dict=True, cpu_offload=isinstance(model, FSDPModule))


def _keys(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: key for key, parameter in model.named_parameters()}


def _trained(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
