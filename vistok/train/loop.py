"""The training loop of all tasks, on the devices that accelerate finds."""

from __future__ import annotations

import logging
import signal
import time
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from vistok.checkpoints import CheckpointError
from vistok.config import differences, load_config, save_config
from vistok.data.loader import Failures, TooManyUnreadableError, listed
from vistok.data.pictures import save_png
from vistok.data.workers import LoaderWorkerError
from vistok.pipelines.folders import BEST_MODEL
from vistok.train.checkpoints import Checkpoints, check_alike, check_numbers, clean
from vistok.train.config import RunConfig
from vistok.train.environment import environment, open_accelerator, start_trackers
from vistok.train.monitor import METRICS_FILE, Console, Meter, MetricsFile
from vistok.train.players import Players
from vistok.train.report import write_run_report
from vistok.train.start import Found, adapt, check_frozen, initialise, open_starts, with_model_of_source
from vistok.train.stopping import StopRequest, TrainingInterrupted
from vistok.train.tasks import Task, Turn, task_type
from vistok.train.tasks.base import forever, on_device
from vistok.train.trail import Trail, earliest
from vistok.types import Clock
from vistok.utils.files import make_folder, write_json
from vistok.utils.locks import holds_files, locked
from vistok.utils.paths import expand
from vistok.utils.processes import is_first_process

log = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """A loss or gradient norm is not finite."""


def train(config: Mapping[str, Any], *, resume: bool = False) -> Path:
    """Run a training config (see ``RunConfig``) to its end and return the run folder.

    The folder gets the resolved config, versions, metrics.jsonl, TensorBoard events, pictures, checkpoints,
    report.html, and the trained model: ``tokenizer/``, or a whole pipeline. On a CPU, a run that was interrupted and
    resumed computes the same numbers as one that was not.

    Args:
        resume: continue from the newest checkpoint of the run folder, or begin at step 0 if there is none yet.

    Raises:
        ConfigError: the config is wrong.
        FileExistsError: the run folder is not empty, and ``resume`` is False.
        CheckpointError: the checkpoint or ``init_from`` does not fit, or the disk is full.
        TrainingDivergedError: a loss or gradient norm became NaN or infinite.
        TrainingInterrupted: SIGTERM or Ctrl-C; a checkpoint was saved.
        LoaderWorkerError: a worker that reads data died.
        FolderInUseError: another process trains into the run folder.
    """
    config = expand(config)
    with _sources_may_be_gone(config, resume):
        config, found = with_model_of_source(config)
    run = RunConfig.parse(config)
    run.model_entry()
    folder = Path(run.output_dir)
    with locked(folder) if is_first_process() else nullcontext():
        _train(config, run, folder, found, resume=resume)
    return folder


def _train(config: Mapping[str, Any], run: RunConfig, folder: Path, found: Found, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the run folder {folder} is a file; choose another with output_dir=…")
    if folder.exists() and holds_files(folder) and not resume:
        raise FileExistsError(
            f"run folder {folder} exists already; go on with --resume, or choose another with output_dir=…"
        )
    with _sources_may_be_gone(config, resume):
        accelerator, task = prepare(run, folder, found)
    try:
        trainer = Trainer(run, task, accelerator, folder)
        if resume:
            trainer.resume(config)
        if accelerator.is_main_process:  # only now: a config that the checkpoint does not fit must not replace its own
            make_folder(folder)
            clean(folder)
            save_config(config, folder / "config.yaml")
            write_json(folder / "environment.json", environment())
            task.save_companions(folder, anew=not trainer.step)
        start_trackers(accelerator, folder, run.training.trackers)
        trainer.run()
        if accelerator.is_main_process:
            trainer.report()
        accelerator.wait_for_everyone()  # a process that leaves while others still export would break their group
    finally:
        accelerator.end_training()


@contextmanager
def _sources_may_be_gone(config: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Add to an error about ``init_from`` how a run that has a checkpoint resumes without its sources."""
    try:
        yield
    except CheckpointError as error:
        folder = Path(str(config.get("output_dir")))
        if resume and config.get("init_from") and Checkpoints(folder / "checkpoints", 1, None).steps():
            error.add_note(
                f"The run's checkpoint has all weights, so the run resumes without init_from, too: vistok train "
                f"{folder / 'config.yaml'} --resume init_from=null"
            )
        raise


def prepare(run: RunConfig, folder: Path, found: Found) -> tuple[Any, Task]:
    """The accelerator, and the task with the model that training starts from.

    Args:
        found: from ``with_model_of_source``.
    """
    from accelerate.utils import set_seed

    starts = open_starts(run, found)
    accelerator = open_accelerator(run, folder)
    set_seed(run.seed)
    make: Callable[[RunConfig, int, int], Task] = task_type(run.task)
    task = make(run, accelerator.process_index, accelerator.num_processes)
    new = initialise(task.model, starts)
    if run.training.lora is not None:
        adapt(task.learner, run.training.lora, new)
    check_frozen(task.learner.freeze(task.freeze), new, starts)
    return accelerator, task


class Trainer:
    """The state of a run, and its training loop."""

    def __init__(self, run: RunConfig, task: Task, accelerator, folder: Path):
        self.seed, self.config, self.task = run.seed, run.training, task
        self.accelerator, self.folder = accelerator, folder
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            self.config.keep_checkpoints,
            self.config.best_metric,
            objective_changes=task.objective_changes,
        )
        self.players = Players(task, self.config, accelerator)
        self.step, self.meter, self.trail = 0, Meter(), Trail()
        self.row: dict[str, float] = {}  # the last row of the log
        self.seconds = 0.0  # of training, counted by the first process
        self.phase: Callable[[str], AbstractContextManager[Any]] = record_function
        """Makes the context in which a phase of a step, such as "forward", runs."""

    def resume(self, config: Mapping[str, Any]) -> None:
        """Load the newest checkpoint; without one, stay at step 0.

        Args:
            config: of this run; differences from the config in the run folder are logged.

        Raises:
            CheckpointError, ValueError: the checkpoint is of another model, or of other data.
        """
        state = self.checkpoints.load()
        if state is not None:
            try:
                self._load(state)
            except ValueError as error:
                error.add_note(self._ways_out(error, config))
                raise
            except torch.OutOfMemoryError:
                raise
            except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
                raise CheckpointError(
                    f"{self.checkpoints.path(state['step'])} holds no whole state of a run ({error!r}). "
                    f"{self.checkpoints.way_round()}"
                ) from error
            if self.accelerator.is_main_process:
                for change in self._changes(config):
                    log.warning("resumed with another %s", change)
                if self.step >= self.config.max_steps:
                    log.warning(
                        "the run is at step %d already: nothing is left to train up to training.max_steps %d",
                        self.step,
                        self.config.max_steps,
                    )
                self.checkpoints.judge_again(state)
                self.checkpoints.prune()  # the process that saved it may have died before it could
        elif self.accelerator.is_main_process:
            log.warning("%s has no checkpoint yet: training begins at step 0", self.folder)

    def _ways_out(self, error: ValueError, config: Mapping[str, Any]) -> str:
        """What to do about a checkpoint that does not fit the run."""
        changes = self._changes(config)
        new_run = f"begin a new run from its weights: output_dir=… init_from={self.folder}"
        damaged = f"If the checkpoint is damaged, or of another run: {self.checkpoints.way_round()}"
        if changes:
            text = (
                f"Since that checkpoint the config has another {', another '.join(changes)}. Resume with what it had, "
                f"or {new_run}"
            )
            return f"{text}. {damaged}" if isinstance(error, CheckpointError) else text
        if isinstance(error, CheckpointError):
            return damaged
        return f"The config is that of the run, so its data are others by now. Put them back, or {new_run}"

    def _changes(self, config: Mapping[str, Any]) -> list[str]:
        """The differences from the config in the run folder."""
        file = self.folder / "config.yaml"
        return differences(load_config(file), config) if file.is_file() else []

    def run(self) -> None:
        """Train to ``max_steps``; the last step always saves a checkpoint and exports the model."""
        config = self.config
        self.open_log()
        console = Console(
            self.folder.name,
            config.max_steps,
            self.step,
            unit=self.task.unit,
            device=self.accelerator.device,
            quiet=not self.accelerator.is_main_process,
        )
        console.introduce(self._introduction())
        batches = forever(self.task.loader)
        with console, self._dead_workers(), StopRequest(self.step) as stop:
            if self.step:  # resumed: the process that saved this checkpoint may have died before it could export
                self.export()
            begin, units = time.monotonic(), 0
            while self.step < config.max_steps:
                units += self.optimise(batches)
                self.step += 1
                console.update(self.step)
                last = self.step == config.max_steps
                stopped = stop.agreed(self.step, self.accelerator) and not last
                saving = _due(self.step, config.save_every) or last
                validating = self.task.validates and saving and not stopped  # a stopped run may have little time
                held_out = {}
                if _due(self.step, config.log_every) or last or validating:
                    self.check_finite()
                    elapsed = time.monotonic() - begin
                    held_out = self._validate(stop) if validating else {}
                    self.log(units, elapsed, held_out)
                    console.report(self.step, self.row)
                    begin, units = time.monotonic(), 0
                pause = time.monotonic()
                if (_due(self.step, config.image_every) or last) and not stopped:
                    self._picture()
                if saving or stopped:
                    self.save(validated=bool(held_out))
                if stopped:
                    number = stop.signal or signal.SIGTERM  # another process may have got the signal
                    raise TrainingInterrupted(
                        f"stopped by {number.name} after step {self.step}; go on with --resume, from "
                        f"{self.checkpoints.path(self.step)}",
                        number,
                    )
                begin += time.monotonic() - pause  # pictures and checkpoints are not training time
        self._name_unreadable()

    def open_log(self) -> None:
        """Open metrics.jsonl, and continue it if the run resumes."""
        if self.accelerator.is_main_process:
            self.metrics = MetricsFile(self.folder / METRICS_FILE, self.step)
            self.seconds = self.metrics.seconds()

    def _introduction(self) -> dict[str, str]:
        """What the console shows before the first step: model, device, folder, and how to watch the run."""
        accelerator, entry = self.accelerator, self.task.config.model["name"]
        precision = "" if self.config.mixed_precision == "no" else f", {self.config.mixed_precision}"
        processes = "" if accelerator.num_processes == 1 else f", {accelerator.num_processes} processes"
        watch = [f"{self.folder / 'images'}"] if self.config.image_every else []
        if "tensorboard" in self.config.trackers:
            watch.append(f"tensorboard --logdir {quote(str(self.folder / 'tensorboard'))}")
        trained = sum(p.numel() for p in self.task.learner.parameters() if p.requires_grad)
        return {
            "model": f"{entry}, {trained:,} trained parameters",
            "device": f"{accelerator.device}{precision}{processes}",
            "folder": f"{self.folder}; report.html at the end",
            "watch": "; ".join(watch) or f"{self.folder / METRICS_FILE}",
        }

    @contextmanager
    def _dead_workers(self) -> Iterator[None]:
        """Raise LoaderWorkerError if a worker dies, which otherwise shows as a broken connection or torch's error."""
        try:
            yield
        except (OSError, EOFError, RuntimeError) as error:
            if cause := self.task.dead_worker():
                message = f"{cause}; {self.checkpoints.last_good()}. Go on with --resume"
                raise LoaderWorkerError(message) from error
            raise

    def optimise(self, batches: Iterator[Any]) -> int:
        """Do one optimisation step; returns how many units of data all processes together have seen in it."""
        parts, units = self.config.gradient_accumulation_steps, 0
        moving: dict[str, None] = {}
        clock = Clock(self.step, self.config.max_steps)
        self.players.begin(self.step)
        for part in range(parts):
            with self.phase("data wait"):
                batch = next(batches)
            self.trail.add_batch(self.step + 1, batch.indices)
            batch = on_device(batch, self.accelerator.device)
            units += self.task.count(batch)
            # Dropout draws from the global generator: seeding it by the step makes it resumable. A loader that starts
            # an epoch draws from it, too, so the batch is read first.
            key = f"{self.seed}/{self.step}/{part}/{self.accelerator.process_index}"
            torch.manual_seed(zlib.crc32(key.encode()))
            with nullcontext() if part == parts - 1 else self.players.no_sync():
                for turn in self._turns(batch, clock):
                    self._add_gradients(turn)
                    moving[turn.player] = None
                    if parts == 1:
                        self._move(turn.player)
        for player in moving if parts > 1 else ():
            self._move(player)
        return units * self.accelerator.num_processes

    def _turns(self, batch: Any, clock: Clock) -> Iterator[Turn]:
        turns = self.task.losses(self.players.wrapped, batch, clock)
        while True:
            with self.phase("forward"), self.accelerator.autocast():
                turn = next(turns, None)
            if turn is None:
                return
            yield turn

    def _add_gradients(self, turn: Turn) -> None:
        player = self.players[turn.player]
        with self.phase("backward"):
            player.backward(turn.loss / self.config.gradient_accumulation_steps)
        with self.phase("logging"):
            self.meter.add(turn.terms)
            self.trail.add(self.step + 1, f"{player.prefix}loss", turn.loss)

    def _move(self, player: str) -> None:
        with self.phase("optimizer"):
            norms = self.players.step(player)
        with self.phase("logging"):
            self.meter.add(norms)
            if not self.players[player].scales_loss:  # scaled gradients are infinite now and then
                for name, norm in norms.items():
                    self.trail.add(self.step + 1, name, norm)

    def log(self, units: int, elapsed: float, held_out: dict[str, float]) -> None:
        """Write the row of a log window.

        Args:
            units: how many units of data all processes have seen in the window.
            elapsed: seconds of training in the window.
            held_out: the held-out losses, if they were measured.
        """
        self.meter.add(self.task.window_metrics())
        means = self.meter.means(partial(self.accelerator.reduce, reduction="mean"))
        self.seconds += elapsed
        means |= held_out
        awaited = "val_" if self.task.validates and not held_out else ""
        self.checkpoints.check_metric(means, prefix=awaited)
        row = {"step": self.step, **means, "lr": self.players.lr}
        row |= {self.task.unit: round(units / elapsed, 2), "seconds": round(self.seconds, 2)}
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
        if self.accelerator.is_main_process:
            with self.checkpoints.disk_errors(METRICS_FILE):
                self.metrics.write(row)
            if warning := self.task.warning(self.step, row):
                log.warning(warning)
        self.row = row

    def check_finite(self) -> None:
        """Check the losses and gradient norms since the last check.

        Raises:
            TrainingDivergedError: on all processes, if one of them is not finite on any process.
        """
        culprit = self.trail.check(self.task.sample_name)
        bad = torch.tensor(float(culprit is not None), device=self.accelerator.device)
        if not self.accelerator.reduce(bad, reduction="sum"):
            return
        from accelerate.utils import gather_object

        culprits = earliest(gather_object([culprit]))
        report = self.folder / "diverged.json"
        if self.accelerator.is_main_process:
            with self.checkpoints.disk_errors(f"{'; '.join(map(str, culprits))}, but {report.name}"):
                write_json(report, [asdict(culprit) for culprit in culprits])
        raise TrainingDivergedError(
            f"{'; '.join(map(str, culprits))} (all of them: {report}); {self.checkpoints.last_good()}. "
            "Lower optimizer.lr, set training.max_grad_norm, or train in float32"
        )

    def _validate(self, stop: StopRequest) -> dict[str, float]:
        """The held-out losses, which the first process measures and all get; empty if the run is asked to stop.

        Raises:
            TooManyUnreadableError: on all processes, after a checkpoint is saved.
        """
        from accelerate.utils import broadcast_object_list

        found: list[dict[str, float] | TooManyUnreadableError] = [{}]
        clock = Clock(self.step, self.config.max_steps)
        with self.players.averaged() as learner:
            if learner is not None and self.accelerator.is_main_process:
                home = learner.model.device  # the CPU, for the whole copy of a sharded model
                learner.to(self.accelerator.device)
                try:
                    with self.accelerator.autocast():
                        found = [self.task.validate(learner, clock, lambda: stop.signal is not None)]
                except TooManyUnreadableError as error:
                    found = [error]
                learner.to(home)
        losses = broadcast_object_list(found)[0]
        if isinstance(losses, TooManyUnreadableError):
            self.save(validated=False)
            path = self.checkpoints.path(self.step)
            losses.add_note(f"These are held-out images; what was trained is saved: go on with --resume, from {path}")
            raise losses
        return losses

    def _picture(self) -> None:
        with self.players.averaged() as learner:
            if learner is not None and self.accelerator.is_main_process:
                for picture in self.task.pictures(learner.model):
                    with self.checkpoints.disk_errors("a picture"):
                        save_png(picture, self.folder / "images" / f"step-{self.step:07d}.png")
                    frames = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, C), for trackers
                    for tracker in self.accelerator.trackers:
                        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                        tracker.log_images({"pictures": frames}, self.step, **layout)

    def report(self) -> None:
        """Write report.html. If that fails, the run is still complete, and `vistok report` makes the page."""
        try:
            with self.checkpoints.disk_errors("report.html"):
                write_run_report(self.folder, examples=self.task.examples)
        except Exception as error:
            error.add_note(
                f"The run itself is complete, in {self.folder}; `vistok report {self.folder}` makes the page"
            )
            raise

    def export(self) -> None:
        """Write the model that users load; also to ``best/`` if its checkpoint is the best by validation."""
        with self.players.averaged() as learner:
            if learner is not None and self.accelerator.is_main_process:
                with self.checkpoints.disk_errors("the trained model"):
                    self.task.export(self.folder, learner.model)
                    if "val_loss" in self.row and self.checkpoints.is_best(self.step):
                        self.task.export(self.folder / BEST_MODEL, learner.model)

    def save(self, *, validated: bool) -> None:
        """Write a checkpoint, and export the model."""
        self.check_finite()
        self.task.loader.count_failures(self._unreadable())  # only the first process's state is saved
        state = self._state()
        judged_by = self.row if validated or not self.task.validates else None
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, state, judged_by, self.task.model)
        self.export()

    def _state(self) -> dict[str, Any]:
        """Everything that ``_load`` needs. All processes must call it."""
        return {
            **self.players.state_dict(),
            "loader": self.task.loader.state_dict(),
            "meter": self.meter.state_dict(partial(self.accelerator.reduce, reduction="mean")),
            "task": self.task.state_dict(),
            "row": self.row,
        }

    def _load(self, state: dict[str, Any]) -> None:
        for part in ("row", "judged_by"):
            if state.get(part) is not None:
                check_numbers(state[part], part)
        self.players.load_state_dict(state)
        self.step, self.row = state["step"], state["row"]
        check_alike(state["loader"], self.task.loader.state_dict(), "loader")
        self.task.loader.load_state_dict(state["loader"])
        self.meter.load_state_dict(state["meter"], self.accelerator.device)
        self.task.load_state_dict(state["task"], first_process=self.accelerator.is_main_process)

    def _unreadable(self) -> Failures:
        """The samples that any process could not read so far. All processes must call it."""
        from accelerate.utils import gather_object

        return dict(ChainMap(*gather_object([self.task.loader.failures])))

    def _name_unreadable(self) -> None:
        """Log once more, at the end, which samples were left out of training and validation."""
        for failures, use in ((self._unreadable(), "training"), (self.task.held_out.failures, "validation")):
            if failures and self.accelerator.is_main_process:
                shown = listed(failures)
                log.warning("%d samples could not be read and were left out of %s:\n%s", len(failures), use, shown)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
