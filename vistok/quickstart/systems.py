"""What the quickstart can show: systems whose room has a folder ``quickstart`` of configs and what they promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from vistok.checkpoints import registry
from vistok.config import check, load_config

__all__ = ["System", "config_file", "find_system", "systems"]

Stage = Literal["tokenizer", "generator", "predictor"]
RECIPE, PROMISES = "quickstart", "system.yaml"


@dataclass(frozen=True)
class System:
    """A tokenizer and a generator that go together: the contents of ``quickstart/system.yaml``.

    Attributes:
        summary: one line for people.
        recognised: share of generated digits that must be recognised, in [0, 1].
        minutes: the whole chain may take, on two cores.
        views: augmented versions of each training digit in the token cache.
        text_length: bytes of the texts that digits are learned by ("a seven"); 0 is class labels.
        captions, edits: of a system that is talked to: shares of held-out digits that must be named, and of edits that
            must be recognised, and be in the hand of what they change; 0 is a system that draws alone.
        given_frames: of clips, how many first frames a second generator goes on from; 0 trains none.
    """

    summary: str
    recognised: float
    minutes: float
    views: int = 32
    text_length: int = 0
    captions: float = 0.0
    edits: float = 0.0
    given_frames: int = 0


@cache
def systems() -> Mapping[str, System]:
    """All systems that have a recipe, by their names, in the registry's order."""
    files = {name: _folder(name) / PROMISES for name in (item.name for item in registry.ENTRIES)}
    return {name: System(**check(System, load_config(file), "")) for name, file in files.items() if file.is_file()}


def find_system(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in systems():
        raise ValueError(f"the quickstart has no system {name!r}; it has {', '.join(systems())}")
    return systems()[name]


def config_file(system: str, stage: Stage) -> Path:
    """Where the config of a stage lies."""
    return _folder(system) / f"{stage}.yaml"


def _folder(name: str) -> Path:
    return registry.entry(name).room / RECIPE
