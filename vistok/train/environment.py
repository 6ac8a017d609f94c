"""The environment of a run: devices and processes, trackers, and a record of versions."""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vistok._version import __version__
from vistok.data.video_decoders import decoder_versions
from vistok.signatures import ConfigError
from vistok.train.config import RunConfig
from vistok.utils.files import atomic_file


def open_accelerator(run: RunConfig, folder: Path):
    """The Accelerator for the devices and processes that this run was started on.

    Raises:
        ConfigError: a tracker is not installed, or the launcher asks for another precision than the config.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    for name in run.training.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"training.trackers: {name} is not installed; pip install 'vistok[{name}]'")
    _check_launcher(run.training.mixed_precision)
    AcceleratorState._reset_state()  # else the precision of an earlier run in the same process would stay
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it accelerate does not find several CPU processes
        mixed_precision=run.training.mixed_precision,
        log_with=list(run.training.trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
    )


def _check_launcher(mixed_precision: str) -> None:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch always sets it, by default to no
    if launched not in ("no", mixed_precision):
        raise ConfigError(
            f"accelerate launch says mixed precision {launched}, the config {mixed_precision}; set "
            f"training.mixed_precision={launched}, or start with --mixed_precision no"
        )


def start_trackers(accelerator, folder: Path, trackers: Sequence[str]) -> None:
    """Start the trackers. TensorBoard's events and W&B's files go into the run folder, whose name W&B's run gets.

    A resumed run continues the same W&B run.
    """
    options = {}
    if "wandb" in trackers and accelerator.is_main_process:
        options = {"name": folder.name, "dir": str(folder), "id": _wandb_id(folder / "wandb.id"), "resume": "allow"}
    accelerator.init_trackers("vistok", init_kwargs={"wandb": options})


def _wandb_id(path: Path) -> str:
    """The id in a file; the first call makes it."""
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text(secrets.token_hex(8))
    return path.read_text()


def environment() -> dict[str, Any]:
    """A record of what produced a run: versions, git revision, device, command."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "safetensors")
    return {
        "vistok": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        **decoder_versions(),
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
