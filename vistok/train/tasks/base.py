"""The interface of tasks: what is trained, on which data, and the losses of a batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn

from vistok.checkpoints import Model
from vistok.data.loader import Loader
from vistok.train.config import MODEL, PlayerConfig, RunConfig
from vistok.train.names import matching
from vistok.types import Clock


class Turn(NamedTuple):
    """One player's turn on a batch.

    Attributes:
        player: name of the player that minimises ``loss``.
        loss: a scalar with a graph.
        terms: scalars to log, the loss among them ("loss", or "d_loss" of an adversary).
    """

    player: str
    loss: Tensor
    terms: dict[str, Tensor]


class Learner(nn.Module):
    """A model with the trainable parts of its losses: one module, called once per batch.

    The parameters of ``model`` are exported and averaged. The others are trained, saved and resumed with them, but not
    exported.
    """

    EXPORTED = "model."
    """The prefix of the exported weights in the learner's state dict."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self._frozen: tuple[nn.Module, ...] = ()

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """All parameters by name; those of the model have the model's own names."""
        return {name.removeprefix(self.EXPORTED): parameter for name, parameter in self.named_parameters()}

    def freeze(self, patterns: Sequence[str]) -> set[str]:
        """Freeze the parameters whose names match; modules with no other parameters stay in evaluation mode.

        Returns:
            The names that match.

        Raises:
            ConfigError: a pattern matches no name.
        """
        names = matching(self.parameters_by_name(), patterns, "freeze")
        self.leave(names)
        return names

    def leave(self, names: Collection[str]) -> None:
        """Freeze the named parameters; modules with no other parameters stay in evaluation mode."""
        named = self.parameters_by_name()
        for name in names:
            named[name].requires_grad_(False)
        parts = [module for module in self.modules() if module is not self] if names else []
        own = [(module, list(module.parameters())) for module in parts]
        still = tuple(module for module, trained in own if trained and not any(p.requires_grad for p in trained))
        self._frozen = still or self._frozen

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def with_model(self, model: Model) -> Self:
        """A learner with the same losses and another model, for example the averaged one."""
        view = copy.copy(self)
        view._modules = self._modules | {"model": model}
        return view


class Task(ABC):
    """A training task: its model, its data, and the losses of a batch.

    A task is made from its config, the number of this process and the number of processes.

    Attributes:
        config_type: the run's config with the sections that this task reads.
        metric_prefixes: by player, the prefix of its loss and gradient norm in logs.
        learner: the player that holds the model; on the CPU until the loop moves it.
        loader: batches of this process.
        held_out: batches to validate on; empty (``no_samples``) without validation.
        unit: the metric of throughput, such as "images_per_second".
        changing_parameters: whether some parameters take part in some steps only.
        objective_changes: the steps after which the objective changes, so that checkpoints before and after them
            cannot be compared.
    """

    config_type: ClassVar[type[RunConfig]]
    metric_prefixes: ClassVar[Mapping[str, str]] = {MODEL: ""}
    config: RunConfig
    learner: Learner
    loader: Loader
    held_out: Loader
    unit: str
    changing_parameters: bool = False
    objective_changes: tuple[int, ...] = ()

    @property
    def model(self) -> Model:
        """The model that is exported."""
        return self.learner.model

    @property
    def validates(self) -> bool:
        """Whether there are held-out samples."""
        return len(self.held_out) > 0

    @property
    def freeze(self) -> tuple[str, ...]:
        """Patterns of the names of the model's parameters that are not trained."""
        return self.config.freeze

    def players(self) -> dict[str, nn.Module]:
        """The modules that are trained, by name, the learner first. Each is called once per batch."""
        return {MODEL: self.learner}

    def player_config(self, name: str) -> PlayerConfig:
        """The training config of a player."""
        return self.config.player(name)

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that the losses use, by name. The loop moves them to the device, but does not train or save
        them.

        They run under the run's autocast, as players do, and their weights keep their dtype. So operations that a
        network keeps out of autocast, such as the distances to a codec's codes, stay exact.
        """
        return {}

    @property
    def complete_from(self) -> int:
        """The first step at which all parts of the objective have begun, for previews and profiles."""
        return 0

    def check_sharding(self) -> None:  # noqa: B027 (most have nothing to say)
        """Raise ConfigError if the losses need whole weights, which FSDP2 spreads over processes."""

    @abstractmethod
    def losses(self, players: Mapping[str, nn.Module], batch: Any, clock: Clock) -> Iterator[Turn]:
        """The players' turns, in their order.

        The loop updates a player before it asks for the next turn; with gradient accumulation, all at the end.

        Args:
            players: the modules of ``players``, wrapped for several processes.
        """

    @torch.no_grad()
    def validate(self, learner: Learner, clock: Clock, stopping: Callable[[], bool]) -> dict[str, float]:
        """Means over the held-out samples, as "val_loss" and so on, with the same draws every time.

        Empty if there are no held-out samples, or if ``stopping()`` is True before all are measured.
        """
        device, count = learner.model.device, 0
        totals: dict[str, Tensor] = {}
        self.held_out.epoch = 0  # so that the same views of a token cache are read every time
        for number, batch in enumerate(self.held_out):
            if stopping():
                return {}
            batch = on_device(batch, device)
            for name, value in self._held_out_terms(learner, batch, clock, number).items():
                value = value.float() * len(batch.indices)
                totals[name] = totals[name] + value if name in totals else value
            count += len(batch.indices)
        return {f"val_{name}": (total / count).item() for name, total in totals.items()}

    @abstractmethod
    def _held_out_terms(self, learner: Any, batch: Any, clock: Clock, number: int) -> dict[str, Tensor]:
        """Means over the held-out batch number ``number``, "loss" among them."""

    def dead_worker(self) -> str | None:
        """Which worker that reads data died, and of what; None if none did. Call it after an error."""
        return self.loader.dead_worker() or self.held_out.dead_worker()

    def window_metrics(self) -> dict[str, Tensor]:
        """Metrics of a whole log window. All processes must call it."""
        return {}

    def warning(self, step: int, row: dict[str, float]) -> str | None:
        """A warning for the user about the log row of ``step``, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The state of the task between steps. All processes must call it; that of the first one is saved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], *, first_process: bool) -> None:  # noqa: B027 (as state_dict)
        """Restore a state. Counts are sums over processes, so only the first process takes them."""

    @abstractmethod
    def count(self, batch: Any) -> int:
        """The number of units of throughput in a batch."""

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """The name of a sample in messages: its file, or its position in the cache."""

    @abstractmethod
    def show(self, batch: Any) -> Tensor:
        """The pixels (B, C, H, W) in [-1, 1] of a batch, decoded if they are tokens."""

    def examples(self, count: int) -> Tensor:
        """At most ``count`` images or clips, evenly spread over the data, (n, C, [T,] H, W) in [-1, 1].

        Raises:
            ValueError: the data are not images.
        """
        raise ValueError("this run trains on tokens, not on images")

    @abstractmethod
    def pictures(self, model: Any) -> list[Image.Image]:
        """Pictures of what the model can do now: one, or none if it makes no pixels."""

    def save_companions(self, folder: Path) -> None:  # noqa: B027 (most models stand alone)
        """Write the files that checkpoints need besides the model into the run folder, before training."""

    @abstractmethod
    def export(self, folder: Path, model: Any) -> None:
        """Write the model that users load into the run folder."""


def on_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to the device, except its indices: the host reads them, and would wait for the device."""
    moved = type(batch)(*(None if part is None else part.to(device, non_blocking=True) for part in batch))
    return moved._replace(indices=batch.indices)


def forever(loader: Loader) -> Iterator[Any]:
    """The batches of one epoch after another, without end."""
    while True:
        yield from loader
