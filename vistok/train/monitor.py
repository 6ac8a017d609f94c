"""Monitoring of a run: means of metrics, codebook usage, metrics.jsonl, the console."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, distributed

from vistok.utils.files import atomic_file

METRICS_FILE = "metrics.jsonl"
MOST_STEPS = 10**15


class Meter:
    """Means of scalar tensors over a window. Only reading them waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, over_processes: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """Read the means, averaged over several processes by ``over_processes``, and start a new window."""
        if not self._sums:
            return {}
        values = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        means = dict(zip(self._sums, over_processes(values).tolist()))
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self, over_processes: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, Any]:
        """The unfinished window, so that a resumed run logs the same means."""
        return {"sums": {k: over_processes(v) for k, v in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        sums, counts = state["sums"], state["counts"]
        single = all(value.shape == () and value.is_floating_point() for value in sums.values())
        if not single or sums.keys() != counts.keys() or not all(type(n) is int and n > 0 for n in counts.values()):
            raise TypeError("the sums of the metrics are no numbers with their counts")
        self._sums = {name: value.to(device) for name, value in sums.items()}
        self._counts = dict(counts)


def perplexity(counts: Tensor) -> Tensor:
    """The perplexity of the distribution of codes that were chosen so often: 1 .. the number of codes."""
    share = counts / counts.sum()
    return (-(share * share.clamp_min(1e-12).log()).sum()).exp()


def expected_usage(codebook_size: int, count: int) -> float:
    """The share of a codebook, in [0, 1], that ``count`` uniformly drawn codes are expected to use."""
    return 1 - (1 - 1 / codebook_size) ** count


class CodeUsage:
    """Counts the codes that a tokenizer chooses in a window.

    Attributes:
        counts: (codebook_size,) how often each code was chosen on this process.
    """

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, ids: Tensor) -> None:
        ids = ids.flatten()
        # bincount would wait for the device, to know the largest id.
        self.counts = self.counts.to(ids.device).scatter_add(0, ids, torch.ones_like(ids))

    def read(self) -> dict[str, Tensor]:
        """Read the share of codes in use and the perplexity of their distribution (1 .. codebook_size), over all
        processes, and start a new window."""
        counts = self.over_processes()
        self.counts = torch.zeros_like(self.counts)
        return {"codebook_usage": (counts > 0).float().mean(), "perplexity": perplexity(counts)}

    def over_processes(self) -> Tensor:
        """The counts of all processes together. All of them must call it."""
        counts = self.counts.clone()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        return counts


class CodebookWatch:
    """Notices a dying codebook: usage stays below ``SHARE`` of the possible usage for ``PATIENCE`` steps.

    Args:
        possible: the share of the codebook, 0..1, that uniformly drawn tokens of one log window would use.
        remedies: config keys of this tokenizer that may help, with the values to set.
    """

    SHARE, PATIENCE = 0.1, 500

    def __init__(self, possible: float, remedies: Sequence[str]):
        self.possible, self.remedies = possible, remedies
        self._low_since: int | None = None
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """The step since which usage is low, and whether a warning was given, so that resumed runs do not repeat it."""
        return {"low_since": self._low_since, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._low_since, self._warned = state["low_since"], state["warned"]

    def update(self, step: int, usage: float) -> str | None:
        """Take the usage of the window that ends with ``step``; returns the warning when it is due, once per run."""
        if usage >= self.SHARE * self.possible:
            self._low_since = None
            return None
        self._low_since = step if self._low_since is None else self._low_since
        if self._warned or step - self._low_since < self.PATIENCE:
            return None
        self._warned = True
        options = "; ".join(self.remedies) or "a smaller codebook"
        return (
            f"the codebook is dying: {usage:.1%} of its codes are in use since step {self._low_since}, where evenly "
            f"spread tokens would use {self.possible:.1%}. Remedies: {options}"
        )


class CodebookMonitor:
    """Metrics of the codes in a log window, and a warning if few are in use. Does nothing for continuous tokens.

    Args:
        codebook_size: None if tokens are continuous.
        watch: notices a dying codebook, or None.
    """

    def __init__(self, codebook_size: int | None, watch: CodebookWatch | None):
        self.usage = None if codebook_size is None else CodeUsage(codebook_size)
        self.watch = watch

    def add(self, tokens: Tensor) -> None:
        if self.usage is not None:
            self.usage.add(tokens)

    def read(self) -> dict[str, Tensor]:
        """Read the metrics of the window, over all processes, and start a new window."""
        return {} if self.usage is None else self.usage.read()

    def warning(self, step: int, row: dict[str, float]) -> str | None:
        """A warning for the user about the log row of ``step``, or None."""
        return None if self.watch is None else self.watch.update(step, row["codebook_usage"])

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs. All processes must call it."""
        return {
            "counts": None if self.usage is None else self.usage.over_processes(),
            "watch": None if self.watch is None else self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, first_process: bool) -> None:
        """Restore a state. Its counts are sums over processes, so only the first process takes them."""
        if self.usage is not None and first_process:
            self.usage.counts = state["counts"]
        if self.watch is not None:
            self.watch.load_state_dict(state["watch"])


class MetricsFile:
    """metrics.jsonl: one JSON object per line, in the order of steps, without repeats after a resume.

    A number that is not finite, such as fp16's first gradient norms, is null, because JSON cannot express it.
    """

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        if path.exists():
            kept = [json.dumps(row) for row in read_metrics(path) if (row["step"] or 0) <= resumed_step]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def write(self, row: dict[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(numbers, allow_nan=False) + "\n")

    def seconds(self) -> float:
        """The training time in seconds up to the last row."""
        rows = read_metrics(self.path) if self.path.exists() else []
        return last_seconds(rows) or 0.0


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of a metrics.jsonl, with None for values that are not finite; a last line that was cut off when the
    process died is left out.

    Raises:
        ValueError: another line is not a row; the message has its number.
    """
    *whole, _ = Path(path).read_text(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no row of metrics ({error}); remove the line") from error
    return rows


def _row(row: dict[str, float | None]) -> dict[str, float | None]:
    """A row with None for values that are not finite. Raises TypeError or AttributeError if it is none."""
    if not all(value is None or isinstance(value, int | float) for value in row.values()):
        raise TypeError("expected numbers by name")
    step = row.get("step")
    if step is None or isinstance(step, bool) or not 0 <= step <= MOST_STEPS or step % 1:
        raise TypeError(f"expected a step, a whole number from 0, got {step!r}"[:200])
    # math.isfinite fails for integers beyond any float
    kept = {name: value if value is None or abs(value) <= sys.float_info.max else None for name, value in row.items()}
    return kept | {"step": int(step)}


def last_seconds(rows: Sequence[Mapping[str, float | None]]) -> float | None:
    """The training time that the last row with one tells; None if none does."""
    return next((row["seconds"] for row in reversed(rows) if row.get("seconds") is not None), None)


def memory_in_use(device: torch.device) -> int:
    """Memory use in bytes: on a GPU, the most that torch has reserved so far; elsewhere, the process's current use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return psutil.Process().memory_info().rss


BESIDE_THE_LOSS = {"psnr": ("PSNR", ".2f"), "codebook_usage": ("codes", ".0%"), "accuracy": ("accuracy", ".1%")}
"""Metrics that the console shows beside the loss, if they are logged: label and format by name."""


class Console:
    """Shows loss, speed, memory and time left: a progress bar on a terminal, plain lines elsewhere, nothing if
    ``quiet``."""

    def __init__(self, title: str, max_steps: int, step: int, *, unit: str, device: torch.device, quiet: bool):
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._unit, self._device, self._quiet, self._max_steps = unit, device, quiet, max_steps
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

    def introduce(self, facts: Mapping[str, str]) -> None:
        """Print facts about the run, one per line."""
        if not self._quiet:
            width = max(map(len, facts))
            for name, text in facts.items():
                self._console.print(f"{name:{width}}  {text}", markup=False, highlight=False, soft_wrap=True)

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
        speed = f"{row[self._unit]:,.0f} {self._unit.replace('_per_second', '/s')}"
        held_out = f" (held-out {row['val_loss']:.4g})" if "val_loss" in row else ""
        quality = "".join(
            f"  {label} {row[name]:{form}}" for name, (label, form) in BESIDE_THE_LOSS.items() if name in row
        )
        note = f"loss {row['loss']:.4g}{held_out}{quality}  {speed}  {memory_in_use(self._device) / 2**30:.2f} GiB"
        if self._live:
            self._progress.update(self._task, completed=step, note=note)
        elif not self._quiet:
            left = (time.monotonic() - self._begin) / max(step - self._first, 1) * (self._max_steps - step)
            print(f"step {step}/{self._max_steps}  {note}  {left:.0f} s left", flush=True)
