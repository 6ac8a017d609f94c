"""Who is trained: modules with an optimizer each, and the average of the model, on one process or over many."""

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
from vistok.checkpoints.weights import hash_weights, listing
from vistok.config import ConfigError
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
    """One module that is trained, on its device, with its optimizer, schedule and clipping.

    Args:
        module: as the task made it.
        wrapped: the module as it is called in training, so that gradients are averaged over processes.
        prefix: of the names of its loss and gradient norm in logs.

    Attributes:
        scaler: of its loss in fp16, or None.
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
        """Whether its loss is scaled, for gradients in fp16."""
        return self.scaler is not None

    def begin(self, step: int) -> None:
        """Learning rates and weight decays become those of ``step``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._lr_factor(step)
            group["weight_decay"] = group["initial_weight_decay"] * self._decay_factor(step)

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of a loss."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def move(self) -> dict[str, Tensor]:
        """Apply the gradients; their norm, if they are clipped."""
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
        """What ``load_state_dict`` needs. Shards are gathered, so all processes must call it."""
        return {
            "weights": whole_state_dict(self.module),
            "optimizer": named_state(self.optimizer, self.module, _names(self.module)),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, fresh: Collection[str] = ()) -> None:
        """Go back to a state, of a run on any number of processes, sharded or not; all processes must call it.

        Args:
            fresh: keys of weights and names of parameters that the state lacks.

        Raises:
            CheckpointError: a state of another module.
        """
        load_whole_state_dict(self.module, state["weights"], source="the checkpoint", optional=fresh)
        load_named_state(self.optimizer, self.module, _names(self.module), state["optimizer"], fresh=fresh)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])


class Players:
    """All players of a task, and the average of what is exported.

    Attributes:
        wrapped: what to call in training, by name.
        average: the averaged weights, or None. Never wrapped, but sharded like the model.
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
        """Average, checkpoint, compile and shard the model."""
        device = self._accelerator.device
        self.average = AveragedModel(learner.model, training.ema_decay) if training.ema_decay else None
        if self._sharded and self._accelerator.is_main_process:
            # Where a whole model is needed (pictures, export), process 0 gathers the shards into this one.
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
        """Replicate a player on several processes, but for a model that is sharded. Other players are small."""
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
        """The model's learning rate."""
        return self._players[MODEL].lr

    def begin(self, step: int) -> None:
        """Learning rates become those of ``step``."""
        for player in self._players.values():
            player.begin(step)

    def move(self, name: str) -> dict[str, Tensor]:
        """Apply a player's gradients; their norm, if they are clipped."""
        norms = self._players[name].move()
        if name == MODEL and self.average is not None:
            self.average.update(self._learner.model)
        return norms

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """A context in which gradients add up on each process, and are not averaged over all (``no_sync``)."""
        with ExitStack() as stack:
            for player in self._players.values():
                stack.enter_context(self._accelerator.no_sync(player.wrapped))
            yield

    @contextmanager
    def best(self) -> Iterator[Learner | None]:
        """The learner with the averaged model where there is one, in evaluation mode meanwhile.

        All processes must enter; of a sharded model, process 0 gets a whole copy and the others None.
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
        """Everything that ``load_state_dict`` needs; all processes must call it. "model" is what is exported, under its
        own names, and the average's "model" alike."""
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
        """Go back to a state, of a run on any number of processes, sharded or not; all processes must call it.

        Raises:
            CheckpointError: a state of another model, or of a version whose optimizers were saved otherwise.
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
        """Log a message on the first process alone."""
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
        """The learner's weights of those of its model and its losses, and the keys that they lack."""
        own = _others(self._learner.state_dict())
        for what, keys in (("begin afresh", own.keys() - losses), ("are left out", losses.keys() - own)):
            if keys:
                self._say("parts of losses that the checkpoint and this run do not share %s: %s", what, listing(keys))
        kept = {key: losses[key] for key in losses if key in own}
        return kept | {EXPORTED + key: tensor for key, tensor in model.items()}, own.keys() - losses

    def _load_average(self, saved: Mapping[str, Any] | None) -> None:
        if self.average is None:
            if saved is not None:
                self._say("training.ema_decay is 0: the checkpoint's averaged weights are left out")
        elif saved is None:
            self._say("the checkpoint has no averaged weights: they begin at the weights of its step")
            self.average.restart(self._learner.model)
        else:
            load_whole_state_dict(self.average.model, saved["model"], source="the checkpoint's average")
            self.average.updates = saved["updates"]

    @cache  # noqa: B019 (one object per run)
    def _hashes(self) -> dict[str, str]:
        """What tells the frozen networks from others of their names."""
        digests = {name: hashlib.sha256(type(network).__name__.encode()) for name, network in self._frozen.items()}
        for name, digest in digests.items():
            hash_weights(digest, self._frozen[name].state_dict())
        return {name: digest.hexdigest() for name, digest in digests.items()}


def _check_frozen(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise CheckpointError if a network of that name had other weights."""
    other = [name for name in own if saved.get(name, own[name]) != own[name]]
    if other:
        raise CheckpointError(
            f"{other[0]} has other weights than in the run that saved the checkpoint; give the same weights file, or "
            "start a new run with init_from"
        )


def _names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that configs and checkpoints know."""
    return module.parameters_by_name() if isinstance(module, Learner) else dict(module.named_parameters())


def _others(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A learner's state without what is exported."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith(EXPORTED)}
