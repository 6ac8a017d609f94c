"""The systems of the quickstart: those whose package has a folder ``quickstart`` with configs and score targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from vistok.checkpoints import registry
from vistok.config import load_config
from vistok.signatures import check

__all__ = ["System", "config_file", "find_system", "systems"]

Stage = Literal["tokenizer", "generator", "predictor"]
RECIPE, PROMISES = "quickstart", "system.yaml"


@dataclass(frozen=True)
class System:
    """A tokenizer with its generator, and their targets: the contents of ``quickstart/system.yaml``.

    Attributes:
        summary: one line of description.
        recognised: least share of generated digits that are recognised, in [0, 1].
        minutes: most minutes of the whole chain, on two cores.
        views: augmented versions of each training digit in the token cache.
        text_length: most bytes of the texts that condition the generator ("a seven"); 0 conditions on class labels.
        captions, edits: targets of a conversational system: least share of held-out digits that are named right, and of
            edits that are recognised, and that keep the style of the digit they change; 0 for other systems.
        given_frames: of clips, the number of first frames that a second generator continues; 0 trains none.
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
    """All systems that have a quickstart, by name, in the registry's order."""
    files = {name: _folder(name) / PROMISES for name in (item.name for item in registry.ENTRIES)}
    return {name: System(**check(System, load_config(file), "")) for name, file in files.items() if file.is_file()}


def find_system(name: str) -> System:
    """The system of this name.

    Raises:
        ValueError: there is no such system.
    """
    if name not in systems():
        raise ValueError(f"the quickstart has no system {name!r}; it has {', '.join(systems())}")
    return systems()[name]


def config_file(system: str, stage: Stage) -> Path:
    """Path of a stage's config."""
    return _folder(system) / f"{stage}.yaml"


def _folder(name: str) -> Path:
    return registry.entry(name).room / RECIPE
