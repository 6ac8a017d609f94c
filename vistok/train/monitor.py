"""What a run says while it goes: metrics.jsonl, TensorBoard, the console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed

from vistok.files import atomic_file


class Meter:
    """Means of scalar tensors over a window, without waiting for the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, over_processes: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """Read the means, averaged by ``over_processes`` where there are several, and start a new window."""
        if not self._sums:
            return {}
        values = torch.stack([total.float() / self._counts[name] for name, total in self._sums.items()])
        means = dict(zip(self._sums, over_processes(values).tolist()))
        self._sums, self._counts = {}, {}
        return means


class CodeUsage:
    """Which codes the tokenizer chose in a window."""

    def __init__(self, codebook_size: int):
        self.codebook_size, self._counts = codebook_size, 0

    def add(self, ids: Tensor) -> None:
        self._counts = self._counts + torch.bincount(ids.flatten(), minlength=self.codebook_size)

    def read(self) -> dict[str, Tensor]:
        """The share of codes in use, and the perplexity of their distribution (1 .. codebook_size), over all processes;
        a new window begins."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._counts)
        share = self._counts / self._counts.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        usage = (self._counts > 0).float().mean()
        self._counts = 0
        return {"codebook_usage": usage, "perplexity": entropy.exp()}


class MetricsFile:
    """metrics.jsonl: one JSON object per line, in the order of steps, without repeats after a resume."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= resumed_step]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def write(self, row: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def seconds(self) -> float:
        """Training time that the rows account for."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return json.loads(lines[-1])["seconds"] if lines else 0.0


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Console:
    """Loss, speed and time left: a progress bar on a terminal, plain lines elsewhere, nothing on other processes."""

    def __init__(self, title: str, max_steps: int, step: int, *, unit: str, quiet: bool):
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._unit, self._quiet, self._max_steps = unit, quiet, max_steps
        self._console = RichConsole()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=quiet)
        self._task = self._progress.add_task(title, total=max_steps, completed=step, note="")
        self._live = self._console.is_terminal and not quiet
        self._begin, self._first = time.monotonic(), step

    def __enter__(self) -> Console:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._progress.stop()

    def update(self, step: int) -> None:
        if self._live:
            self._progress.update(self._task, completed=step)

    def report(self, step: int, row: dict[str, float]) -> None:
        note = f"loss {row['loss']:.4g}  {row[self._unit]:,.0f} {self._unit.replace('_per_second', '/s')}"
        if self._live:
            self._progress.update(self._task, completed=step, note=note)
        elif not self._quiet:
            left = (time.monotonic() - self._begin) / max(step - self._first, 1) * (self._max_steps - step)
            print(f"step {step}/{self._max_steps}  {note}  {left:.0f} s left", flush=True)
