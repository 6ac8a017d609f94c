"""``vistok train --profile``: where the time of a training step goes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vistok.train.config import RunConfig
from vistok.train.loop import Trainer, prepare
from vistok.train.start import with_model_of_source
from vistok.train.tasks.base import forever
from vistok.utils.files import atomic_file
from vistok.utils.paths import expand

PHASES = ("data wait", "forward", "backward", "optimizer")
WARMUP, STEPS = 2, 5


class Profile(NamedTuple):
    """What a profiled run found.

    Attributes:
        trace: the trace file, for chrome://tracing or Perfetto.
        seconds: per step, of each phase, and of the rest ("other").
        step_seconds: of a whole step.
        units_per_second: throughput, in the task's ``unit``.
    """

    trace: Path
    seconds: dict[str, float]
    step_seconds: float
    units_per_second: float
    unit: str


def profile(config: Mapping[str, Any]) -> Profile:
    """Train a few steps under torch's profiler. Nothing is saved but the trace, beside where the run would go.

    Where there is a GPU, each phase ends when the device is done with it, so that phases are measured, not launches.

    Raises:
        ConfigError: anything wrong with the config.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    run = RunConfig.parse(with_model_of_source(expand(config)))
    run.model_entry()
    trace = Path(f"{run.output_dir}.trace.json")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        accelerator, task = prepare(run, folder)
        trainer = Trainer(run, task, accelerator, folder)
        trainer.step = task.complete_from  # steps of before everything takes part would look cheap
        batches = forever(task.loader)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        units = 0
        for _ in range(WARMUP):
            trainer.optimise(batches)
            trainer.step += 1
        _wait(accelerator.device)
        with torch_profile(activities=activities) as profiler:
            for _ in range(STEPS):
                with torch.profiler.record_function("step"):
                    units += trainer.optimise(batches)
                    trainer.step += 1
                    _wait(accelerator.device)
        if accelerator.is_main_process:
            with atomic_file(trace) as temporary:
                profiler.export_chrome_trace(str(temporary))
    return _summary(profiler, trace, units, task.unit)


def _wait(device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(profiler, trace: Path, units: int, unit: str) -> Profile:
    totals = {event.key: event.cpu_time_total / 1e6 / STEPS for event in profiler.key_averages()}
    seconds = {phase: totals.get(phase, 0.0) for phase in PHASES}
    whole = totals["step"]
    seconds["other"] = max(whole - sum(seconds.values()), 0.0)
    return Profile(trace, seconds, whole, units / (whole * STEPS), unit)
