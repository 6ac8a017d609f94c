"""``vistok train --dry-run``: what a run would be, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vistok.data.loader import ImageBatch
from vistok.data.pictures import grid, save_png, to_pil
from vistok.train.config import RunConfig
from vistok.train.loop import prepare
from vistok.train.parallel import checkpoint_activations, wants_fsdp2
from vistok.train.stages import Stage

SHOWN = 64
"""Samples of the first batch in its picture."""


@dataclass(frozen=True)
class Preview:
    """What a config amounts to.

    Attributes:
        parameters: trained parameters by player ("model", "adversary").
        memory: bytes per device by purpose. "activations" is an estimate: what the forward pass of two samples keeps
            for its gradient, scaled to the batch, in the precision of this machine's pass; workspace comes on top.
        samples_per_epoch, units_per_epoch: what one epoch holds, in samples and in ``unit`` ("images", "tokens").
        held_out: samples to validate on.
        batch_size: samples per optimisation step, over all processes and accumulated batches.
        steps, epochs: the length of the run.
        picture: PNG of the first batch.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    samples_per_epoch: int
    units_per_epoch: int
    unit: str
    held_out: int
    batch_size: int
    steps: int
    epochs: float
    picture: Path


def preview(config: Mapping[str, Any]) -> Preview:
    """Check a config, build its model, read its first batch, and say what training would take.

    The run folder is not created; the picture lies beside where it would be, ``OUTPUT_DIR.first-batch.png``.

    Raises:
        ConfigError: anything wrong with the config.
    """
    run = RunConfig.parse(config)
    run.model_entry()
    accelerator, stage = prepare(run, Path(run.output_dir))
    batch = next(iter(stage.loader))
    picture = Path(f"{run.output_dir}.first-batch.png")
    if accelerator.is_main_process:
        save_png(first_batch(stage, batch), picture)
    steps = run.training.max_steps
    batch_size = len(batch.indices) * accelerator.num_processes * run.training.gradient_accumulation_steps
    samples = len(stage.loader.reader)
    shards = accelerator.num_processes if wants_fsdp2(run) else 1
    return Preview(
        parameters=_parameters(stage),
        memory=memory(stage, batch, run, shards),
        samples_per_epoch=samples,
        units_per_epoch=samples * stage.count(batch) // len(batch.indices),
        unit=stage.unit.removesuffix("_per_second"),
        held_out=len(stage.held_out.reader) if stage.held_out is not None else 0,
        batch_size=batch_size,
        steps=steps,
        epochs=steps * batch_size / samples,
        picture=picture,
    )


def _players(stage: Stage) -> dict[str, nn.Module]:
    return {"model": stage.model} | ({"adversary": stage.adversary} if stage.adversary is not None else {})


def _parameters(stage: Stage) -> dict[str, int]:
    return {name: sum(p.numel() for p in trained) for name, trained in _trained(stage).items()}


def _trained(stage: Stage) -> dict[str, list[nn.Parameter]]:
    return {name: [p for p in player.parameters() if p.requires_grad] for name, player in _players(stage).items()}


def memory(stage: Stage, batch: Any, run: RunConfig, shards: int) -> dict[str, int]:
    """Bytes per device by purpose; ``shards`` is over how many devices FSDP2 spreads the model."""

    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    model, trained = stage.model, _trained(stage)
    gradients = size(trained["model"]) // shards + size(trained.get("adversary", ()))
    weights = size([*model.parameters(), *model.buffers()]) // shards
    frozen = stage.objective.parameters() if stage.objective is not None else ()
    return {
        "weights": weights + size(trained.get("adversary", ())) + size(frozen),
        "gradients": gradients,
        "optimizer": 2 * gradients,  # Adam's two moments
        "averaged weights": weights if run.training.ema_decay else 0,
        "activations": activations(stage, batch, run),
    }


def activations(stage: Stage, batch: Any, run: RunConfig) -> int:
    """Estimated bytes that the forward pass of one batch keeps for its gradient."""
    if run.training.activation_checkpointing:
        checkpoint_activations(stage.model)
    step = stage.adversary.config.start_step if stage.adversary is not None else 0
    few = min(2, len(batch.indices))
    stage.model.train()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.data_ptr() for module in _players(stage).values() for p in module.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=run.training.mixed_precision != "no"),
    ):
        loss, _ = stage.losses(stage.model, type(batch)(*(tensor[:few] for tensor in batch)), step)
    del loss  # kept alive until here, so that no storage was counted twice at one address
    return sum(kept.values()) * len(batch.indices) // few


@torch.no_grad()
def first_batch(stage: Stage, batch: Any) -> Image.Image:
    """The images of a batch; of tokens, what the tokenizer decodes them to."""
    if isinstance(batch, ImageBatch):
        return grid(to_pil(batch.pixels[:SHOWN]))
    return grid(to_pil(stage.tokenizer.eval().decode(batch.tokens[:SHOWN]).clamp(-1, 1)))
