"""What a run trains: a model, its average, its adversary and their optimizers, on one process or over many."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vistok.checkpoints import Model
from vistok.train.config import RunConfig
from vistok.train.optim import AveragedModel, build_optimizer, load_named_state, named_state
from vistok.train.parallel import (
    checkpoint_activations,
    clip_grad_norm,
    load_whole_state_dict,
    replicating,
    shard,
    wants_fsdp2,
    whole_state_dict,
)
from vistok.train.stages import Stage
from vistok.types import AfterBackward


class Models:
    """Models and optimizers of a run, on their devices.

    Attributes:
        model, adversary: wrapped for several processes; call these in training. ``adversary`` may be None.
        average: the averaged weights, or None. Never wrapped, but sharded like the model.
        sharded: whether FSDP2 spreads the model over the processes.
    """

    def __init__(self, run: RunConfig, stage: Stage, accelerator):
        self._run, self._accelerator = run, accelerator
        self.sharded = wants_fsdp2(run) and accelerator.num_processes > 1
        self._place_model(stage.model)
        self.adversary = self._adversary_optimizer = None
        if stage.adversary is not None:
            self._place_adversary(stage.adversary)
        self._peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers()]

    def _place_model(self, model: Model) -> None:
        training, device = self._run.training, self._accelerator.device
        model.train().to(device)
        self._movers = [module for module in model.modules() if isinstance(module, AfterBackward)]
        self.average = AveragedModel(model, training.ema_decay) if training.ema_decay else None
        # Where a whole model is needed (pictures, export), process 0 gathers the shards into this one.
        self._whole = copy.deepcopy(model).cpu() if self.sharded and self._accelerator.is_main_process else None
        if training.activation_checkpointing:
            checkpoint_activations(model)
        if training.compile:
            model.compile()
        if self.sharded:
            shard(model, device, mixed_precision=training.mixed_precision)
            if self.average:
                shard(self.average.model, device)
        optimizer = build_optimizer(model.parameters(), self._run.optimizer, self._run.optimizer.lr)
        self.model, self._optimizer = (
            (model, optimizer) if self.sharded else self._accelerator.prepare(model, optimizer)
        )

    def _place_adversary(self, adversary: nn.Module) -> None:
        adversary.to(self._accelerator.device)
        lr = adversary.config.lr or self._run.optimizer.lr
        optimizer = build_optimizer(adversary.parameters(), self._run.optimizer, lr)
        if self.sharded:  # accelerate would shard it, too, small as it is
            self.adversary, self._adversary_optimizer = nn.parallel.DistributedDataParallel(adversary), optimizer
        else:
            self.adversary, self._adversary_optimizer = self._accelerator.prepare(adversary, optimizer)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self._optimizer, self._adversary_optimizer) if o is not None]

    @property
    def lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def set_lr(self, factor: float) -> None:
        """Every learning rate becomes this factor of its peak."""
        for optimizer, peaks in zip(self._optimizers(), self._peak_lrs):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Meanwhile gradients are only added up on each process."""
        with ExitStack() as stack:
            for module in (self.model, self.adversary):
                if module is not None:
                    stack.enter_context(self._accelerator.no_sync(module))
            yield

    def step(self, *, adversary: bool) -> dict[str, Tensor]:
        """Apply the gradients, the ``adversary``'s too if it takes part by now; the gradient norms, if clipped."""
        self._after_backward()
        norms = self._apply(self._optimizer, self.model, "grad_norm")
        if adversary:
            norms |= self._apply(self._adversary_optimizer, self.adversary, "d_grad_norm")
        if self.average is not None:
            self.average.update(self._bare(self.model))
        return norms

    def _apply(self, optimizer, module: nn.Module, name: str) -> dict[str, Tensor]:
        norms = {}
        if self._run.training.max_grad_norm:
            if self._accelerator.scaler is not None:
                self._accelerator.unscale_gradients(optimizer)
            norms[name] = clip_grad_norm(module.parameters(), self._run.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norms

    def _after_backward(self) -> None:
        with replicating() if self.sharded else nullcontext():
            for module in self._movers:
                module.after_backward()

    def _bare(self, module: nn.Module) -> nn.Module:
        return self._accelerator.unwrap_model(module)

    @contextmanager
    def best(self) -> Iterator[Model | None]:
        """The averaged model where there is one, else the trained one, in evaluation mode meanwhile.

        All processes must enter; of a sharded model, process 0 gets a whole copy and the others None.
        """
        model = self.average.model if self.average else self._bare(self.model)
        if self.sharded:
            state, model = whole_state_dict(model), self._whole
            if model is not None:
                model.load_state_dict(state)
        if model is not None:
            model.eval()
        yield model
        self._bare(self.model).train()

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs. Shards are gathered, so all processes must call it."""
        model, average = self._bare(self.model), self.average
        state = {
            "model": whole_state_dict(model),
            "optimizer": named_state(self._optimizer, model),
            "average": {"model": whole_state_dict(average.model), "updates": average.updates} if average else None,
        }
        if self.adversary is not None:
            state["adversary"] = self._bare(self.adversary).state_dict()
            state["adversary_optimizer"] = self._adversary_optimizer.state_dict()
        if self._accelerator.scaler is not None:
            state["scaler"] = self._accelerator.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state, of a run on any number of processes, sharded or not; all processes must call it.

        Raises:
            CheckpointError: a state of another model.
        """
        model, average = self._bare(self.model), self.average
        load_whole_state_dict(model, state["model"], source="the checkpoint")
        load_named_state(self._optimizer, model, state["optimizer"])
        if average is not None:
            load_whole_state_dict(average.model, state["average"]["model"], source="the checkpoint's average")
            average.updates = state["average"]["updates"]
        if self.adversary is not None:
            self._bare(self.adversary).load_state_dict(state["adversary"])
            self._adversary_optimizer.load_state_dict(state["adversary_optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
