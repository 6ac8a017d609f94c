"""The training loop: one for all stages, on whatever devices accelerate finds."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vistok._version import __version__
from vistok.config import save_config
from vistok.data.pictures import save_png
from vistok.files import write_json
from vistok.hub import WEIGHTS, CheckpointError, Model, load_strictly, read_weights
from vistok.train.checkpoints import Checkpoints
from vistok.train.config import RunConfig
from vistok.train.monitor import Console, Meter, MetricsFile
from vistok.train.optim import AveragedModel, build_optimizer, lr_factor
from vistok.train.stages import STAGES, Stage, forever


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite."""


def train(config: Mapping[str, Any], *, resume: bool = False) -> Path:
    """Run a training config (see ``RunConfig``) to its end and return the run folder.

    The folder gets the resolved config, versions, metrics.jsonl, TensorBoard events, pictures, checkpoints, and what
    users load: ``tokenizer/``, or a whole pipeline. On a CPU an interrupted run that is resumed goes through the same
    numbers as one that was not.

    Args:
        resume: go on from the newest checkpoint of the run folder.

    Raises:
        ConfigError: anything wrong with the config.
        FileExistsError: the run folder exists and ``resume`` is False.
        CheckpointError: nothing to resume, or ``init_from`` does not fit.
        TrainingDivergedError: the loss became NaN or infinite.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    run = RunConfig.parse(config)
    run.model_entry()
    folder = Path(run.output_dir)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise FileExistsError(
            f"run folder {folder} exists already; go on with --resume, or choose another with output_dir=…"
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # several CPU processes are found only if this is said
        mixed_precision=run.training.mixed_precision,
        log_with="tensorboard",
        project_dir=folder,
    )
    set_seed(run.seed)
    stage = STAGES[run.stage](run, accelerator.process_index, accelerator.num_processes)
    if run.init_from:
        start_from(stage.model, Path(run.init_from), run.stage)
    checkpoints = Checkpoints(folder / "checkpoints", run.training.keep_checkpoints)
    state = checkpoints.load() if resume else None
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        write_json(folder / "environment.json", environment())
    accelerator.init_trackers("tensorboard")
    Trainer(run, stage, accelerator, checkpoints, folder, state).run()
    accelerator.end_training()
    return folder


class Trainer:
    """The state of a run and its one loop."""

    def __init__(
        self,
        run: RunConfig,
        stage: Stage,
        accelerator,
        checkpoints: Checkpoints,
        folder: Path,
        state: dict[str, Any] | None,
    ):
        self.run_config, self.config, self.stage = run, run.training, stage
        self.accelerator, self.checkpoints, self.folder = accelerator, checkpoints, folder
        self.lr_factor = lr_factor(run.lr_scheduler, self.config.max_steps)
        stage.model.train()
        if self.config.compile:
            stage.model.compile()
        # The averaged model lives where the trained one does, but is never wrapped.
        stage.model.to(accelerator.device)
        self.average = AveragedModel(stage.model, self.config.ema_decay) if self.config.ema_decay else None
        optimizer = build_optimizer(stage.model.parameters(), run.optimizer, run.optimizer.lr)
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.adversary = self.adversary_optimizer = None
        if stage.adversary is not None:
            stage.adversary.to(accelerator.device)
            lr = stage.adversary.config.lr or run.optimizer.lr
            optimizer = build_optimizer(stage.adversary.parameters(), run.optimizer, lr)
            self.adversary, self.adversary_optimizer = accelerator.prepare(stage.adversary, optimizer)
        if stage.objective is not None:
            stage.objective.to(accelerator.device)
        self.peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers()]
        self.step = 0
        if state is not None:
            self._load(state)
        self.metrics = MetricsFile(folder / "metrics.jsonl", self.step)
        self.seconds = self.metrics.seconds()
        self.meter = Meter()

    def _optimizers(self) -> list:
        return [o for o in (self.optimizer, self.adversary_optimizer) if o is not None]

    def run(self) -> None:
        """Train to ``max_steps``; checkpoint and export at the end in any case."""
        config, main = self.config, self.accelerator.is_main_process
        console = Console(self.folder.name, config.max_steps, self.step, unit=self.stage.unit, quiet=not main)
        batches = forever(self.stage.loader)
        with console:
            begin, units = time.monotonic(), 0
            while self.step < config.max_steps:
                units += self._optimise(batches)
                self.step += 1
                console.update(self.step)
                last = self.step == config.max_steps
                if _due(self.step, config.log_every) or last:
                    console.report(self.step, self._log(units, time.monotonic() - begin))
                    begin, units = time.monotonic(), 0
                pause = time.monotonic()
                if main and (_due(self.step, config.image_every) or last):
                    self._picture()
                if main and (_due(self.step, config.save_every) or last):
                    self.save()
                begin += time.monotonic() - pause  # pictures and checkpoints are not training time

    def _optimise(self, batches) -> int:
        """One optimisation step; returns how many units of data it saw."""
        config, accelerator = self.config, self.accelerator
        for optimizer, peaks in zip(self._optimizers(), self.peak_lrs):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * self.lr_factor(self.step)
        units = 0
        for part in range(config.gradient_accumulation_steps):
            batch = type(batch := next(batches))(*(t.to(accelerator.device, non_blocking=True) for t in batch))
            units += self.stage.count(batch)
            # Dropout draws from the global generator: keying it by the step makes it resumable. A loader that starts
            # an epoch draws from it too, so the batch comes first.
            key = f"{self.run_config.seed}/{self.step}/{part}/{accelerator.process_index}"
            torch.manual_seed(zlib.crc32(key.encode()))
            with ExitStack() as stack:
                if part < config.gradient_accumulation_steps - 1:
                    stack.enter_context(accelerator.no_sync(self.model))
                    stack.enter_context(accelerator.no_sync(self.adversary) if self.adversary else nullcontext())
                self._backward(batch)
        self._update(self.optimizer, self.model, "grad_norm")
        if self.adversary is not None and self.step >= self.stage.adversary.config.start_step:
            self._update(self.adversary_optimizer, self.adversary, "d_grad_norm")
        if self.average is not None:
            self.average.update(self.accelerator.unwrap_model(self.model))
        return units * accelerator.num_processes

    def _backward(self, batch) -> None:
        parts = self.config.gradient_accumulation_steps
        with self.accelerator.autocast():
            loss, terms = self.stage.losses(self.model, batch, self.step)
        self.accelerator.backward(loss / parts)
        self.meter.add(terms)
        if self.adversary is not None:
            with self.accelerator.autocast():
                terms = self.stage.adversary_losses(self.adversary, self.step)
            if terms:
                self.accelerator.backward(terms["d_loss"] / parts)
                self.meter.add(terms)

    def _update(self, optimizer, module: torch.nn.Module, norm_name: str) -> None:
        if self.config.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(module.parameters(), self.config.max_grad_norm)
            self.meter.add({norm_name: torch.as_tensor(norm)})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _log(self, units: int, elapsed: float) -> dict[str, float]:
        self.meter.add(self.stage.window_metrics())
        means = self.meter.means(partial(self.accelerator.reduce, reduction="mean"))
        self.seconds += elapsed
        if not math.isfinite(means["loss"]):
            steps = self.checkpoints.steps()
            last = f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "none was saved"
            raise TrainingDivergedError(
                f"the loss is {means['loss']} in the {self.config.log_every} steps before step {self.step}; {last}. "
                "Lower optimizer.lr, set training.max_grad_norm, or train in float32"
            )
        row = {"step": self.step, **means, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {self.stage.unit: round(units / elapsed, 2), "seconds": round(self.seconds, 2)}
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
        if self.accelerator.is_main_process:
            self.metrics.write(row)
        return row

    @contextmanager
    def best_model(self) -> Iterator[Model]:
        """The averaged model where there is one, else the trained one, in evaluation mode meanwhile."""
        model = self.average.model if self.average else self.accelerator.unwrap_model(self.model)
        model.eval()
        yield model
        self.accelerator.unwrap_model(self.model).train()

    def _picture(self) -> None:
        with self.best_model() as model:
            save_png(self.stage.picture(model), self.folder / "images" / f"step-{self.step:07d}.png")

    def save(self) -> None:
        """Write a checkpoint and what users load."""
        unwrap = self.accelerator.unwrap_model
        state = {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.stage.loader.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }
        if self.adversary is not None:
            state["adversary"] = unwrap(self.adversary).state_dict()
            state["adversary_optimizer"] = self.adversary_optimizer.state_dict()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.checkpoints.save(self.step, state)
        with self.best_model() as model:
            self.stage.export(self.folder, model)

    def _load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        load_strictly(self.accelerator.unwrap_model(self.model), state["model"], source="the checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage.loader.load_state_dict(state["loader"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.adversary is not None:
            self.accelerator.unwrap_model(self.adversary).load_state_dict(state["adversary"])
            self.adversary_optimizer.load_state_dict(state["adversary_optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def start_from(model: Model, source: Path, stage: str) -> None:
    """Load the weights of a run or model folder into ``model``, for fine-tuning.

    Raises:
        CheckpointError: nothing there, or weights of another shape.
    """
    folder = source / stage if (source / stage).is_dir() else source
    if not folder.exists():
        raise CheckpointError(f"init_from: there is no folder {source}")
    load_strictly(model, read_weights(folder / WEIGHTS), source=f"init_from {folder}")


def environment() -> dict[str, Any]:
    """What produced a run: versions, git revision, machine, command."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "safetensors")
    return {
        "vistok": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "command": sys.argv,
    }


def _git_revision() -> str | None:
    try:
        where = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
