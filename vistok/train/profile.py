"""``vistok train --profile``: where the time of a training step goes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vistok.train.config import RunConfig
from vistok.train.environment import start_trackers
from vistok.train.loop import Trainer, prepare
from vistok.train.start import with_model_of_source
from vistok.train.tasks.base import forever
from vistok.utils.files import atomic_file
from vistok.utils.paths import expand

if TYPE_CHECKING:
    import torch

PHASES = ("data wait", "draws", "forward", "backward", "optimizer", "logging")
LOG_ROW = "log row"
WARMUP, STEPS = 2, 5


class Profile(NamedTuple):
    """The times of a profiled run.

    Attributes:
        trace: the trace file, for chrome://tracing or Perfetto.
        seconds: per step, for each phase of ``PHASES`` and the rest ("other"). "logging" includes the time of a log row
            divided by ``training.log_every``, the steps per row.
        step_seconds: seconds of a whole step, including that share.
        units_per_second: throughput, in the task's ``unit``.
    """

    trace: Path
    seconds: dict[str, float]
    step_seconds: float
    units_per_second: float
    unit: str


def profile(config: Mapping[str, Any]) -> Profile:
    """Train a few steps under torch's profiler. Only the trace is saved, to ``OUTPUT_DIR.trace.json``.

    On a GPU, each phase but the draws waits for the device at its end, so that the times are those of the work, not of
    kernel launches. A log row is written to a temporary folder and its TensorBoard, never to a service.

    Raises:
        ConfigError: the config is wrong.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    config, found = with_model_of_source(expand(config))
    run = RunConfig.parse(config)
    run.model_entry()
    trackers = tuple(name for name in run.training.trackers if name == "tensorboard")
    run = replace(run, training=replace(run.training, trackers=trackers))
    trace = Path(f"{run.output_dir}.trace.json")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        accelerator, task = prepare(run, folder, found)
        try:
            trainer = Trainer(run, task, accelerator, folder)
            trainer.step = task.complete_from  # earlier steps are cheaper, because not all losses take part
            trainer.phase = partial(_phase, accelerator.device)
            start_trackers(accelerator, folder, trackers)
            trainer.open_log()
            batches = forever(task.loader)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            units, begin = 0, time.monotonic()
            for _ in range(WARMUP):
                units += trainer.optimise(batches)
                trainer.step += 1
            _log(trainer, units, begin)
            _wait(accelerator.device)
            units, begin = 0, time.monotonic()
            with torch_profile(activities=activities) as profiler:
                for _ in range(STEPS):
                    with torch.profiler.record_function("step"):
                        units += trainer.optimise(batches)
                        trainer.step += 1
                        _wait(accelerator.device)
                with torch.profiler.record_function(LOG_ROW):
                    _log(trainer, units, begin)
            if accelerator.is_main_process:
                with atomic_file(trace) as temporary:
                    profiler.export_chrome_trace(str(temporary))
        finally:
            accelerator.end_training()
    return _summary(profiler, trace, units, task.unit, run.training.log_every)


def _log(trainer: Trainer, units: int, begin: float) -> None:
    trainer.check_finite()
    trainer.log(units, time.monotonic() - begin, {})


@contextmanager
def _phase(device: torch.device, name: str) -> Iterator[None]:
    from torch.profiler import record_function

    with record_function(name):
        yield
        _wait(device)


def _wait(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(profiler, trace: Path, units: int, unit: str, log_every: int) -> Profile:
    totals = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    seconds = {phase: totals.get(phase, 0.0) / STEPS for phase in PHASES}
    seconds["forward"] -= seconds["draws"]  # draws are made within the forward phase
    row = totals[LOG_ROW] / log_every if log_every else 0.0
    seconds["logging"] += row
    whole = totals["step"] / STEPS + row
    seconds["other"] = max(whole - sum(seconds.values()), 0.0)
    return Profile(trace, seconds, whole, units / (whole * STEPS), unit)
