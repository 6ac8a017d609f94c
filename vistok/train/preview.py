"""``vistok train --dry-run``: size, memory and length of a run, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vistok.data.movies import overview
from vistok.data.pictures import save_png
from vistok.train.config import MODEL, RunConfig
from vistok.train.loop import prepare
from vistok.train.parallel import checkpoint_activations, wants_fsdp2
from vistok.train.start import with_model_of_source
from vistok.train.tasks import Task
from vistok.types import Clock
from vistok.utils.paths import expand

SHOWN = 64
"""The most samples in the picture of the first batch."""


@dataclass(frozen=True)
class DryRun:
    """The size, memory and length of a run.

    Attributes:
        parameters: number of trained parameters by player ("model", "adversary").
        memory: bytes per device by purpose. "activations" is an estimate: the bytes that the forward pass of two
            samples keeps for the backward pass, scaled to the batch. Workspace is not counted.
        samples_per_epoch, units_per_epoch: size of an epoch, in samples and in ``unit`` ("images", "tokens").
        operations: floating-point operations per optimisation step, over all processes: three times those of the
            forward pass, counted on two samples.
        held_out: number of samples to validate on.
        batch_size: samples per optimisation step, over all processes and accumulated batches.
        steps, epochs: the length of the run.
        picture: PNG of the first batch.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    samples_per_epoch: int
    units_per_epoch: int
    unit: str
    operations: int
    held_out: int
    batch_size: int
    steps: int
    epochs: float
    picture: Path


def preview(config: Mapping[str, Any]) -> DryRun:
    """Check a config, build its model, read its first batch, and estimate what training would take.

    The run folder is not created. The picture is written to ``OUTPUT_DIR.first-batch.png``, beside it.

    Raises:
        ConfigError: the config is wrong.
    """
    config, found = with_model_of_source(expand(config))
    run = RunConfig.parse(config)
    run.model_entry()
    accelerator, task = prepare(run, Path(run.output_dir), found)
    batch = next(iter(task.loader))
    picture = Path(f"{run.output_dir}.first-batch.png")
    if accelerator.is_main_process:
        save_png(overview(task.show(_first(batch, SHOWN))), picture)
    steps = run.training.max_steps
    batch_size = len(batch.indices) * accelerator.num_processes * run.training.gradient_accumulation_steps
    samples = len(task.loader.reader)
    shards = accelerator.num_processes if wants_fsdp2(run.training, task) else 1
    few = _first(batch, 2)
    with FlopCounterMode(display=False) as counted:
        kept = memory(task, batch, run, shards)
    return DryRun(
        parameters={name: sum(p.numel() for p in trained) for name, trained in _trained(task).items()},
        memory=kept,
        samples_per_epoch=samples,
        units_per_epoch=samples * task.count(batch) // len(batch.indices),
        unit=task.unit.removesuffix("_per_second"),
        operations=3 * counted.get_total_flops() * batch_size // len(few.indices),
        held_out=len(task.held_out.reader),
        batch_size=batch_size,
        steps=steps,
        epochs=steps * batch_size / samples,
        picture=picture,
    )


def _first(batch: Any, count: int) -> Any:
    """The first samples of a batch."""
    return type(batch)(*(None if tensor is None else tensor[:count] for tensor in batch))


def _trained(task: Task) -> dict[str, list[nn.Parameter]]:
    return {name: [p for p in player.parameters() if p.requires_grad] for name, player in task.players().items()}


def memory(task: Task, batch: Any, run: RunConfig, shards: int) -> dict[str, int]:
    """Bytes per device by purpose; ``shards`` is the number of devices over which FSDP2 shards the model."""

    def size(modules: Iterable[nn.Module]) -> int:
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    trained = {
        name: sum(p.numel() * p.element_size() for p in parameters) for name, parameters in _trained(task).items()
    }
    gradients = sum(trained.values()) - trained[MODEL] + trained[MODEL] // shards
    others = [player for name, player in task.players().items() if name != MODEL]
    return {
        "weights": size([task.learner]) // shards + size([*others, *task.frozen().values()]),
        "gradients": gradients,
        "optimizer": 2 * gradients,  # Adam's two moments
        "averaged weights": size([task.model]) // shards if run.training.ema_decay else 0,
        "activations": activations(task, batch, run),
    }


def activations(task: Task, batch: Any, run: RunConfig) -> int:
    """Estimated bytes that the forward pass of one batch keeps for the backward pass."""
    if run.training.activation_checkpointing:
        checkpoint_activations(task.model)
    few = min(2, len(batch.indices))
    task.learner.train()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    players = task.players()
    parameters = {p.data_ptr() for module in players.values() for p in module.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=run.training.mixed_precision != "no"),
    ):
        turns = task.losses(players, _first(batch, few), Clock(task.complete_from, run.training.max_steps))
        turn = next(turn for turn in turns if turn.player == MODEL)
    del turn  # kept alive until here, so that no storage was counted twice at one address
    return sum(kept.values()) * len(batch.indices) // few
