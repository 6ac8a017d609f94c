"""The data that the stages of the quickstart pass on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistok.data.config import DataConfig
from vistok.data.tokens import TokenCache
from vistok.pipelines import Pipeline
from vistok.quickstart.systems import System
from vistok.utils.report import Score


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long.

    Attributes:
        system: a name of ``systems()``; None takes the first.
        seed: of data, trainings and samples.
        tokenizer, generator, predictor: ``key=value`` changes to the configs.
        views: augmented versions of each training digit in the token cache; None takes the system's.
        classifier_steps: training steps of the classifier that scores the samples.
        samples_per_class: generated digits of each class; a fifth as many clips.
    """

    system: str | None = None
    seed: int = 0
    tokenizer: Sequence[str] = ()
    generator: Sequence[str] = ()
    predictor: Sequence[str] = ()
    views: int | None = None
    classifier_steps: int = 600
    samples_per_class: int = 50


@dataclass(frozen=True)
class Chain:
    """The trained models and the data they were trained on.

    Attributes:
        out: the folder of all results.
        data: the tokenizer's training data.
        pipe: the tokenizer with the generator.
        predictor: for clips, the tokenizer with a generator that continues given frames; else None.
        cache: the generators' training tokens.
        facts: what the scores depend on: "sampling", "recipe" and "environment".
        begin: ``time.monotonic()`` at the start.
    """

    out: Path
    recipe: Recipe
    system: System
    data: DataConfig
    pipe: Pipeline
    predictor: Pipeline | None
    cache: TokenCache
    facts: dict[str, Any]
    begin: float

    def split(self, name: str) -> DataConfig:
        """The data of a split."""
        return replace(self.data, split=name)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    @property
    def report(self) -> Path:
        """Path of the report page."""
        return self.out / "report.html"


@dataclass(frozen=True)
class Outcome:
    """The results of a quickstart.

    Attributes:
        scores: a dataclass of numbers.
        seconds: from the start until the pictures were drawn.
        protocol: everything that the scores depend on.
        lines: the scores as they are printed, with targets.
    """

    scores: Any
    seconds: float
    protocol: dict[str, Any]
    lines: list[Score]
