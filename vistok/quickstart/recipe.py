"""What a quickstart trains, and how much of everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistok.config import load_config
from vistok.quickstart.systems import Stage, config_file


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how much of everything.

    Attributes:
        system: a name of ``systems()``; None is the first.
        seed: of everything.
        tokenizer, generator: ``key=value`` changes to the two configs.
        views: augmented versions of each training digit in the token cache; None takes what the system says.
        classifier_steps: of fitting the classifier that judges the samples.
        samples_per_class: generated digits of each class.
    """

    system: str | None = None
    seed: int = 0
    tokenizer: Sequence[str] = ()
    generator: Sequence[str] = ()
    views: int | None = None
    classifier_steps: int = 600
    samples_per_class: int = 50

    def config(self, stage: Stage, out: Path) -> dict[str, Any]:
        """The config of a stage, with everything it reads and writes inside ``out``."""
        config = load_config(config_file(self.system, stage), getattr(self, stage))
        config |= {"output_dir": str(out / stage), "seed": self.seed}
        if stage == "tokenizer":
            config["data"] = {**config["data"], "seed": self.seed}
        else:
            config["tokens"] = str(out / "tokens")
        return config
