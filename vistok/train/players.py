"""Players: modules that are trained, each with its own optimizer; and the average (EMA) of the model."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.adapters import LOW_RANK
from vistok.checkpoints.weights import hash_weights, listing
from vistok.quantizers.vq import with_counts
from vistok.signatures import ConfigError
from vistok.train.checkpoints import check_alike
from vistok.train.config import MODEL, PlayerConfig, TrainingConfig
from vistok.train.optim import (
    AveragedModel,
    build_optimizer,
    decay_factor,
    lr_factor,
)
from vistok.train.parallel import (
    checkpoint_activations,
    clip_grad_norm,
    load_named_state,
    load_whole_state_dict,
    named_state,
    replicating,
    shard,
    wants_fsdp2,
    whole_state_dict,
)
from vistok.train.tasks import Learner, Task
from vistok.types import AfterBackward

log = logging.getLogger(__name__)
EXPORTED = Learner.EXPORTED


class Player:
    """A module that is trained, with its optimizer, learning-rate schedule and gradient clipping.

    Args:
        module: the task's module, on its device.
        wrapped: the module that is called in training, which averages gradients over processes.
        prefix: of the names of its loss and gradient norm in logs.

    Attributes:
        scaler: scales its loss in fp16; else None.
    """

    def __init__(
        self,
        module: nn.Module,
        wrapped: nn.Module,
        config: PlayerConfig,
        training: TrainingConfig,
        device: torch.device,
        *,
        prefix: str,
    ):
        self.module, self.wrapped, self.prefix = module, wrapped, prefix
        self._max_norm = config.max_grad_norm
        self._lr_factor = lr_factor(config.lr_scheduler, training.max_steps, config.optimizer.lr)
        self._decay_factor = decay_factor(config.optimizer, training.max_steps)
        self.optimizer = build_optimizer(_names(module).items(), config.optimizer)
        fp16 = training.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def scales_loss(self) -> bool:
        """Whether its loss is scaled, because gradients are in fp16."""
        return self.scaler is not None

    def begin(self, step: int) -> None:
        """Set the learning rates and weight decays of ``step``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._lr_factor(step)
            group["weight_decay"] = group["initial_weight_decay"] * self._decay_factor(step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the parameters' ``grad``."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> dict[str, Tensor]:
        """Apply the gradients; returns their norm by its name in logs, if they are clipped."""
        with replicating():
            for module in self.module.modules():
                if module.training and isinstance(module, AfterBackward):
                    module.after_backward()
        norms = {}
        if self._max_norm:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            norms[f"{self.prefix}grad_norm"] = clip_grad_norm(self.module.parameters(), self._max_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs. It gathers shards, so all processes must call it."""
        return {
            "weights": whole_state_dict(self.module),
            "optimizer": named_state(self.optimizer, self.module, _names(self.module)),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, fresh: Collection[str] = ()) -> None:
        """Load a state from a run on any number of processes, sharded or not. All processes must call it.

        Args:
            fresh: keys of weights and names of parameters that the state lacks.

        Raises:
            CheckpointError: the state is that of another module.
        """
        load_whole_state_dict(self.module, state["weights"], source="the checkpoint", optional=fresh)
        load_named_state(self.optimizer, self.module, _names(self.module), state["optimizer"], fresh=fresh)
        if self.scaler is not None and state["scaler"] is not None:
            check_alike(state["scaler"], self.scaler.state_dict(), "scaler")
            self.scaler.load_state_dict(state["scaler"])


class Players:
    """All players of a task, and the average of the exported model.

    Attributes:
        wrapped: by name, the modules to call in training.
        average: the averaged weights, or None. It is never wrapped, but sharded like the model.
    """

    def __init__(self, task: Task, training: TrainingConfig, accelerator):
        self._learner, self._accelerator = task.learner, accelerator
        self._sharded = wants_fsdp2(training, task) and accelerator.num_processes > 1
        self._players: dict[str, Player] = {}
        self.average: AveragedModel | None = None
        self._whole: Learner | None = None
        unknown = task.config.players.keys() - task.players().keys()
        if unknown:
            raise ConfigError(
                f"players.{min(unknown)}: this run has no such player; it has {', '.join(task.players())}"
            )
        self._frozen = task.frozen()
        for network in self._frozen.values():
            network.to(accelerator.device)
        for name, module in task.players().items():
            module.train().to(accelerator.device)
            if name == MODEL:
                self._prepare(task.learner, training)
            self._players[name] = Player(
                module,
                self._wrap(name, module, changing=task.changing_parameters),
                task.player_config(name),
                training,
                accelerator.device,
                prefix=task.metric_prefixes[name],
            )
        self.wrapped = {name: player.wrapped for name, player in self._players.items()}

    def _prepare(self, learner: Learner, training: TrainingConfig) -> None:
        """Make the average, then set up activation checkpointing, compilation and sharding of the model."""
        device = self._accelerator.device
        self.average = AveragedModel(learner.model, training.ema_decay) if training.ema_decay else None
        if self._sharded and self._accelerator.is_main_process:
            # For pictures and export, process 0 gathers the shards into this whole model.
            self._whole = copy.deepcopy(learner).cpu()
        if training.activation_checkpointing:
            checkpoint_activations(learner.model)
        if training.compile:
            learner.model.compile()
        if self._sharded:
            shard(learner, device, mixed_precision=training.mixed_precision)
            if self.average:
                shard(self.average.model, device)

    def _wrap(self, name: str, module: nn.Module, *, changing: bool) -> nn.Module:
        """Wrap a player in DDP, unless there is one process, or it is the sharded model. Other players are small, and
        never sharded."""
        device = self._accelerator.device
        if self._accelerator.num_processes == 1 or (self._sharded and name == MODEL):
            return module
        return nn.parallel.DistributedDataParallel(
            module, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=changing
        )

    def __getitem__(self, name: str) -> Player:
        return self._players[name]

    @property
    def lr(self) -> float:
        """The learning rate of the model."""
        return self._players[MODEL].lr

    def begin(self, step: int) -> None:
        """Set the learning rates and weight decays of ``step`` for all players."""
        for player in self._players.values():
            player.begin(step)

    def step(self, name: str) -> dict[str, Tensor]:
        """Apply a player's gradients; returns their norm by its name in logs, if they are clipped."""
        norms = self._players[name].step()
        if name == MODEL and self.average is not None:
            self.average.update(self._learner.model)
        return norms

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which each process accumulates gradients without averaging over processes (``no_sync``)."""
        with ExitStack() as stack:
            for player in self._players.values():
                stack.enter_context(self._accelerator.no_sync(player.wrapped))
            yield

    @contextmanager
    def averaged(self) -> Iterator[Learner | None]:
        """A context with the learner in evaluation mode, with the averaged model if there is one.

        All processes must enter it. Of a sharded model, process 0 gets a whole copy and the others None.
        """
        model = self._learner.model if self.average is None else self.average.model
        if self._sharded:
            state, learner = whole_state_dict(self._learner), self._whole
            if self.average is not None:
                state |= {EXPORTED + key: tensor for key, tensor in whole_state_dict(model).items()}
            if learner is not None:
                learner.load_state_dict(state)
        else:
            learner = self._learner.with_model(model)
        if learner is not None:
            learner.eval()
        yield learner
        self._learner.train()

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs. All processes must call it.

        "model" holds the weights of the exported model under the model's own names; so does "model" in "average".
        """
        players = {name: player.state_dict() for name, player in self._players.items()}
        weights, average = players[MODEL]["weights"], self.average
        players[MODEL]["weights"] = _others(weights)
        return {
            "model": {key.removeprefix(EXPORTED): weights[key] for key in weights if key.startswith(EXPORTED)},
            "average": average and {"model": whole_state_dict(average.model), "updates": average.updates},
            "players": players,
            "frozen": self._hashes(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from a run on any number of processes, sharded or not. All processes must call it.

        Raises:
            CheckpointError: the state is that of another model, or of a version with another format.
        """
        if "players" not in state:
            raise CheckpointError(
                "the checkpoint was saved by an earlier version of vistok, whose runs this one cannot go on with; "
                "start a new run from its weights with init_from=RUN, or go on with that version"
            )
        _check_frozen(state["frozen"], self._hashes())
        for name, player in self._players.items():
            if name in state["players"]:
                self._load_player(name, player, state)
            else:
                self._say("the checkpoint has no %s: it begins afresh", name)
        for name in state["players"].keys() - self._players.keys():
            self._say("this run has no %s: the checkpoint's is left out", name)
        self._load_average(state["average"])

    def _say(self, message: str, *values: Any) -> None:
        """Log a warning on the first process only."""
        if self._accelerator.is_main_process:
            log.warning(message, *values)

    def _load_player(self, name: str, player: Player, state: Mapping[str, Any]) -> None:
        saved = dict(state["players"][name])
        fresh: set[str] = set()
        if name == MODEL:
            saved["weights"], fresh = self._with_losses(state["model"], saved["weights"])
            saved["optimizer"] = {k: v for k, v in saved["optimizer"].items() if k in _names(player.module)}
        player.load_state_dict(saved, fresh=fresh)

    def _with_losses(
        self, model: Mapping[str, Tensor], losses: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], set[str]]:
        """The learner's weights, joined from those of the model and the losses, and the keys of losses that are
        missing."""
        own = _others(self._learner.state_dict())
        for what, keys in (("begin afresh", own.keys() - losses), ("are left out", losses.keys() - own)):
            if keys:
                self._say("parts of losses that the checkpoint and this run do not share %s: %s", what, listing(keys))
        kept = {key: losses[key] for key in losses if key in own}
        model, begun, left = with_counts(self._learner.model, self._with_own_scales(model))
        for what, keys in (("begin afresh", begun), ("are left out", left)):
            if keys:
                self._say("counts of codes that the checkpoint and this run do not share %s: %s", what, listing(keys))
        return kept | {EXPORTED + key: tensor for key, tensor in model.items()}, own.keys() - losses

    def _with_own_scales(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with the scales of adapters that the config asks for, since these are no weights."""
        own = self._learner.model.state_dict()
        scales = [key for key in weights if key.endswith(f"{LOW_RANK}scale") and key in own]
        return {**weights, **{key: own[key] for key in scales}}

    def _load_average(self, saved: Mapping[str, Any] | None) -> None:
        if self.average is None:
            if saved is not None:
                self._say("training.ema_decay is 0: the checkpoint's averaged weights are left out")
        elif saved is None:
            self._say("the checkpoint has no averaged weights: they begin at the weights of its step")
            self.average.restart(self._learner.model)
        else:
            weights, _, _ = with_counts(self.average.model, self._with_own_scales(saved["model"]))
            load_whole_state_dict(self.average.model, weights, source="the checkpoint's average")
            check_alike(saved["updates"], self.average.updates, "average.updates")
            self.average.updates = saved["updates"]

    @cache  # noqa: B019 (one object per run)
    def _hashes(self) -> dict[str, str]:
        """A hash of the class and weights of each frozen network, by name."""
        digests = {name: hashlib.sha256(type(network).__name__.encode()) for name, network in self._frozen.items()}
        for name, digest in digests.items():
            hash_weights(digest, self._frozen[name].state_dict())
        return {name: digest.hexdigest() for name, digest in digests.items()}


def _check_frozen(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise CheckpointError if a frozen network had other weights when the checkpoint was saved."""
    other = [name for name in own if saved.get(name, own[name]) != own[name]]
    if other:
        raise CheckpointError(
            f"{other[0]} has other weights than in the run that saved the checkpoint; give the same weights file, or "
            "start a new run with init_from"
        )


def _names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that configs and checkpoints use."""
    return module.parameters_by_name() if isinstance(module, Learner) else dict(module.named_parameters())


def _others(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A learner's state without the exported model."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith(EXPORTED)}
