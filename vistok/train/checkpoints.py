"""The training state on disk: everything that a run needs to resume exactly where it stopped."""

from __future__ import annotations

import errno
import logging
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vistok.checkpoints import CheckpointError, Model, read_weights
from vistok.checkpoints.weights import STATE
from vistok.pipelines.folders import BEST_MODEL
from vistok.signatures import ConfigError
from vistok.utils.files import atomic_folder, read_object, remove_folder, remove_leftovers, restore, write_json
from vistok.utils.spelling import did_you_mean, nearest

log = logging.getLogger(__name__)

BEST = "best.json"
HIGHER_IS_BETTER = ("psnr", "accuracy", "codebook_usage", "perplexity")
DEFAULT_METRICS = ("val_psnr", "val_loss", "psnr")


class Checkpoints:
    """The checkpoints of one run, ``folder/step-0001000/``, each written whole or not at all.

    The newest ones are kept, and so is the best of those that were judged, which ``folder/best.json`` names.

    Args:
        folder: the folder of the checkpoints.
        keep: how many of the newest are kept.
        best_metric: the metric that the best one is chosen by (the highest psnr, the lowest loss). None takes the first
            of ``DEFAULT_METRICS`` that is logged, else loss.
        objective_changes: the steps after which the objective changes, because an adversary joins, or a term begins or
            ends. All metrics may get worse then, so checkpoints before and after such a step are not compared.
    """

    def __init__(self, folder: Path, keep: int, best_metric: str | None, *, objective_changes: Sequence[int] = ()):
        self.folder, self.keep, self._best_metric = folder, keep, best_metric
        self._changes = tuple(objective_changes)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        restore(self.folder)
        names = {path.name for path in self.folder.glob("step-*")}
        steps = {int(match[1]) for match in map(re.compile(r"step-(\d+)").fullmatch, names) if match}
        return sorted(step for step in steps if self.path(step).name in names)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def last_good(self) -> str:
        """A phrase for messages that names the newest checkpoint."""
        steps = self.steps()
        return f"the last good checkpoint is {self.path(steps[-1])}" if steps else "there is no checkpoint yet"

    def best(self) -> dict[str, Any] | None:
        """``{"step", "metric", "value"}`` of the best checkpoint; None if none was judged yet.

        Raises:
            CheckpointError: ``best.json`` is damaged.
        """
        path = self.folder / BEST
        if not path.exists():
            return None
        best = read_object(path)
        kinds = {"step": int, "metric": str, "value": int | float}
        if not all(isinstance(best.get(key), kind) for key, kind in kinds.items()):
            raise CheckpointError(f"{path} is damaged: expected {', '.join(kinds)}, got {best}"[:500] + "; remove it")
        return best

    def is_best(self, step: int) -> bool:
        best = self.best()
        return best is not None and best["step"] == step

    def check_metric(self, row: Mapping[str, float], *, prefix: str = "") -> None:
        """Raise ConfigError unless the log rows have ``best_metric``.

        Args:
            row: a row of the log.
            prefix: "val_" if this row lacks the held-out metrics that other rows have: the check then ignores this
                prefix of ``best_metric``.
        """
        metric = self._metric(row)
        prefix = prefix if metric.startswith(prefix) else ""
        name = metric.removeprefix(prefix)
        if name not in row:
            near = nearest(name, tuple(row))
            hint = did_you_mean(repr(prefix + near)) if near else did_you_mean()
            raise ConfigError(f"training.best_metric: this run logs no {metric!r}{hint} It logs {', '.join(row)}.")

    def _metric(self, row: Mapping[str, float]) -> str:
        return self._best_metric or next((name for name in DEFAULT_METRICS if name in row), "loss")

    def save(self, step: int, state: Mapping[str, Any], row: Mapping[str, float] | None, model: Model) -> Path:
        """Write the state after ``step`` optimisation steps, then remove the checkpoints that are not kept.

        Args:
            model: the model that is trained; its config is written beside the state, so that ``vistok.load`` can read
                the checkpoint.
            row: means over the last log window, which the checkpoint is judged by; None leaves it unjudged.

        Raises:
            CheckpointError: the checkpoint could not be written; earlier ones are untouched.
        """
        path = self.path(step)
        try:
            with atomic_folder(path, replace=True) as temporary:
                torch.save({"step": step, "judged_by": row, **state}, temporary / STATE)
                model.write_config(temporary)
            self._judge(step, row)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_of_torch_writer(error):
                raise
            raise self._not_written(f"the checkpoint of step {step}", error) from error
        self.prune()
        return path

    def prune(self) -> None:
        """Remove all checkpoints but the newest ``keep`` and the best one."""
        best = self.best()
        kept = {*self.steps()[-self.keep :], best["step"] if best else -1}
        for old in set(self.steps()) - kept:
            remove_folder(self.path(old))

    def judge_again(self, state: Mapping[str, Any]) -> None:
        """Judge a loaded checkpoint: the process that wrote it may have died before it was judged."""
        self._judge(state["step"], state.get("judged_by"))

    def _judge(self, step: int, row: Mapping[str, float] | None) -> None:
        if row is None or (metric := self._metric(row)) not in row:
            return
        best = self.best()
        if not math.isfinite(row[metric]):
            log.warning("%s is %s after step %d, so this is not the best checkpoint", metric, row[metric], step)
            return
        sign = 1 if metric.removeprefix("val_") in HIGHER_IS_BETTER else -1
        if best is not None and (best["metric"] != metric or self._era(best["step"]) != self._era(step)):
            best = None  # it was judged by another metric, or under another objective
        if best is None or sign * row[metric] > sign * best["value"]:
            write_json(self.folder / BEST, {"step": step, "metric": metric, "value": row[metric]})

    def _era(self, step: int) -> int:
        """The number of the era of ``step``; checkpoints of one era have the same objective."""
        return sum(step > change for change in self._changes)

    @contextmanager
    def disk_errors(self, what: str) -> Iterator[None]:
        """Turn a failure to write ``what`` into a CheckpointError that says where the run can resume."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise self._not_written(what, error) from error

    def _not_written(self, what: str, error: Exception) -> CheckpointError:
        advice = "Free some space and go on with --resume" if _is_full_disk(error) else "Go on with --resume"
        where = f"below {self.folder.parent}: {error}; {self.last_good()}"
        return CheckpointError(f"{what} could not be written {where}. {advice}")

    def load(self) -> dict[str, Any] | None:
        """The newest state; None if there is none yet.

        Raises:
            CheckpointError: it is damaged, or of another step than its folder says.
        """
        steps = self.steps()
        if not steps:
            return None
        file = self.path(steps[-1]) / STATE
        try:
            state = read_weights(file)
            if state.get("step") != steps[-1]:
                raise CheckpointError(f"{file} holds the state of step {state.get('step')!r}"[:500])
            if damaged := _damaged_part(file):
                raise CheckpointError(f"{file} is damaged: its part {damaged} is not as it was saved")
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self.way_round()}") from error
        return state

    def way_round(self) -> str:
        """What a message says about how to go on without the newest checkpoint."""
        *older, newest = self.steps()
        goes_on = f"--resume goes on from {self.path(older[-1])}" if older else "--resume begins at step 0"
        return f"Remove the folder {self.path(newest)}: then {goes_on}"


def check_alike(saved: Any, own: Any, place: str) -> None:
    """Raise CheckpointError unless a part of a state is of the kind of this run's own part.

    Mappings may hold other keys; of common keys the values are compared. Tensors have the same shape and type; numbers
    are finite, whole ones not negative. Where the run has None, so may be the other, or a number, a tensor, a mapping.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        for key in own.keys() & saved.keys():
            check_alike(saved[key], own[key], f"{place}.{key}")
        return
    if isinstance(own, Tensor) and isinstance(saved, Tensor):
        fits = (saved.shape, saved.dtype, saved.layout) == (own.shape, own.dtype, own.layout)
    elif isinstance(own, bool | str) or isinstance(saved, bool | str):
        fits = type(saved) is type(own)
    elif own is None:
        fits = saved is None or isinstance(saved, int | Tensor | Mapping)
    else:
        fits = type(saved) is type(own) and math.isfinite(saved) and (isinstance(own, float) or saved >= 0)
    if not fits:
        raise CheckpointError(f"the checkpoint's {place} is {_kind(saved)}, where {_kind(own)} is expected")


def check_numbers(saved: Any, place: str) -> None:
    """Raise CheckpointError unless a part of a state is a mapping of names to numbers."""
    numbers = isinstance(saved, Mapping) and all(
        isinstance(name, str) and isinstance(value, int | float) for name, value in saved.items()
    )
    if not numbers:
        raise CheckpointError(f"the checkpoint's {place} holds no numbers by name")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} ({value.layout})".replace("torch.", "")
    return f"{value!r} ({type(value).__name__})"[:80]


def _damaged_part(file: Path) -> str | None:
    """The first part of a file of torch whose bytes do not have the checksum that was saved with them; None if all
    have. Reading tensors does not look at the checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f"of the archive ({error})"


def _is_of_torch_writer(error: Exception) -> bool:
    """Whether torch failed to write: it reports that, nearly always a full disk, as a RuntimeError without a code."""
    return any(text in str(error) for text in ("inline_container.cc", "PytorchStreamWriter", "iostream error"))


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _is_of_torch_writer(error) or isinstance(error, SafetensorError)


def clean(folder: Path) -> None:
    """Remove the half-written files and folders that a killed process left in a run folder."""
    for place in (folder, folder / BEST_MODEL, folder / "checkpoints", folder / "images"):
        remove_leftovers(place)
