"""The contract of every task: what it trains, on which data, and what one batch contributes."""

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
        player: who minimises ``loss``, a scalar with a graph.
        terms: scalars to log; under the name of its loss what the player minimises.
    """

    player: str
    loss: Tensor
    terms: dict[str, Tensor]


class Learner(nn.Module):
    """A model with the trainable parts of its losses: one module, called once per batch.

    Of its parameters those below ``model`` are exported and averaged; the others are trained, saved and resumed with
    them, and end with the run.
    """

    EXPORTED = "model."
    """The prefix, in the learner's state dict, of what is exported."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self._frozen: tuple[nn.Module, ...] = ()

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """All parameters; those of the model under the names that they have in it."""
        return {name.removeprefix(self.EXPORTED): parameter for name, parameter in self.named_parameters()}

    def freeze(self, patterns: Sequence[str]) -> set[str]:
        """Train no parameter whose name fits; modules that have no others stay in evaluation mode.

        Returns:
            the names that fit.

        Raises:
            ConfigError: a pattern that no name fits.
        """
        names = matching(self.parameters_by_name(), patterns, "freeze")
        self.leave(names)
        return names

    def leave(self, names: Collection[str]) -> None:
        """Train none of these parameters; modules that have no others stay in evaluation mode."""
        named = self.parameters_by_name()
        for name in names:
            named[name].requires_grad_(False)
        parts = [module for module in self.modules() if module is not self] if names else []
        own = [(module, list(module.parameters())) for module in parts]
        still = tuple(module for module, trained in own if trained and not any(p.requires_grad for p in trained))
        self._frozen = still or self._frozen

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but frozen modules."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def with_model(self, model: Model) -> Self:
        """The same losses around another model, for example the averaged one."""
        view = copy.copy(self)
        view._modules = self._modules | {"model": model}
        return view


class Task(ABC):
    """One task: its model, its data, and what one batch contributes.

    A task is made from its config, this process's number and how many there are.

    Attributes:
        config_type: the run's config with the sections that this task reads.
        metric_prefixes: what begins the names of a player's loss and gradient norm in logs.
        learner: the player that holds the model, on the CPU until the loop moves it.
        loader: batches of this process.
        held_out: batches to validate on; those of ``no_samples`` without validation.
        unit: what throughput counts.
        changing_parameters: whether some parameters take part in some steps only.
        objective_changes: the steps after which the objective is another, so that checkpoints of before and after
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
        """What is exported."""
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
        """Who is trained, by name, the learner of the model first: each one module that is called once per batch."""
        return {MODEL: self.learner}

    def player_config(self, name: str) -> PlayerConfig:
        """How a player is trained."""
        return self.config.player(name)

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that the losses compute with, by name. The loop moves them to the device, and neither trains
        nor saves them.

        Their weights keep their type, and they compute in the run's mixed precision by autocast, as players do: what a
        network keeps out of autocast, such as the distances of a codec's codes, stays exact.
        """
        return {}

    @property
    def complete_from(self) -> int:
        """The first step at which everything that begins later has begun: what previews and profiles look at."""
        return 0

    def check_sharding(self) -> None:  # noqa: B027 (most have nothing to say)
        """Raise ConfigError if the losses need whole weights, which FSDP2 spreads over processes."""

    @abstractmethod
    def losses(self, players: Mapping[str, nn.Module], batch: Any, clock: Clock) -> Iterator[Turn]:
        """The players' turns, in the order in which they move: each moves before the next turn is asked for, or all at
        the end where gradients of several batches add up.

        Args:
            players: those of ``players``, wrapped for several processes.
        """

    @torch.no_grad()
    def validate(self, learner: Learner, clock: Clock, stopping: Callable[[], bool]) -> dict[str, float]:
        """Means over the held-out samples, as "val_loss", ...; the draws are those of every time before. Nothing if
        there are none, or if the run is ``stopping`` before all are measured."""
        device, count = learner.model.device, 0
        totals: dict[str, Tensor] = {}
        self.held_out.epoch = 0  # of a token cache with several views, the same ones
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
        """Means over one batch, "loss" among them; it is batch ``number`` of the held-out ones."""

    def dead_worker(self) -> str | None:
        """After an error: which process that reads data died of what, or None."""
        return self.loader.dead_worker() or self.held_out.dead_worker()

    def window_metrics(self) -> dict[str, Tensor]:
        """Metrics that only make sense over a whole logging window; all processes call it."""
        return {}

    def warning(self, step: int, row: dict[str, float]) -> str | None:
        """What the log row of ``step`` should make a user do something about."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the task remembers from step to step; all processes call it, and that of the first is saved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], *, first_process: bool) -> None:  # noqa: B027 (as state_dict)
        """Remember what was saved: counts that are sums over processes on the first one alone."""

    @abstractmethod
    def count(self, batch: Any) -> int:
        """How many units of throughput a batch is."""

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """What to call a sample in a message: its file, or where it lies in the cache."""

    @abstractmethod
    def show(self, batch: Any) -> Tensor:
        """The pixels (B, C, H, W) in [-1, 1] that a batch stands for."""

    def examples(self, count: int) -> Tensor:
        """So many images of the data, or clips, evenly spread over it, (n, C, [T,] H, W) in [-1, 1].

        Raises:
            ValueError: the data are no images.
        """
        raise ValueError("this run trains on tokens, not on images")

    @abstractmethod
    def pictures(self, model: Any) -> list[Image.Image]:
        """Pictures of what the model can do now: one, or none where it makes no pixels."""

    def accompany(self, folder: Path) -> None:  # noqa: B027 (most models stand alone)
        """Write what goes with the model into the run folder, before it is trained: checkpoints are used with it."""

    @abstractmethod
    def export(self, folder: Path, model: Any) -> None:
        """Write what users load into the run folder."""


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch on the device, but for its indices: the host reads them, and would wait for the device."""
    moved = type(batch)(*(None if part is None else part.to(device, non_blocking=True) for part in batch))
    return moved._replace(indices=batch.indices)


def forever(loader: Loader) -> Iterator[Any]:
    """One epoch after another."""
    while True:
        yield from loader
