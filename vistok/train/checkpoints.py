"""The training state on disk: everything that a run needs to go on exactly where it stopped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from vistok.files import atomic_folder
from vistok.hub import CheckpointError, read_weights

STATE = "state.pt"


class Checkpoints:
    """The checkpoints of one run, ``folder/step-0001000/``, each written whole or not at all.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of ``step`` (after that many optimisation steps), then remove the oldest checkpoints.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        path = self.path(step)
        try:
            with atomic_folder(path, replace=True) as temporary:
                torch.save({"step": step, **state}, temporary / STATE)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            kept = self.steps()
            last = f"the last good one is {self.path(kept[-1])}" if kept else "there is none yet"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {path}: {error}; {last}. "
                "Free some space and go on with --resume"
            ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return path

    def load(self, step: int | None = None) -> dict[str, Any]:
        """Read the state of ``step``, by default the newest.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"nothing to resume: {self.folder} has no checkpoint; start without --resume")
        return read_weights(self.path(steps[-1] if step is None else step) / STATE)
