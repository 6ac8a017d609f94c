"""What the stages of the quickstart hand on."""

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
    """What is trained, and how much of everything.

    Attributes:
        system: a name of ``systems()``; None is the first.
        seed: of everything.
        tokenizer, generator, predictor: ``key=value`` changes to the configs.
        views: augmented versions of each training digit in the token cache; None takes what the system says.
        classifier_steps: of fitting the classifier that judges the samples.
        samples_per_class: generated digits of each class; of clips a fifth as many.
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
    """What was trained.

    Attributes:
        out: the folder of everything.
        data: what the tokenizer was trained on.
        pipe: the tokenizer with the generator.
        predictor: of clips, the tokenizer with a generator that goes on from given frames.
        cache: what the generators were trained on.
        facts: what the scores depend on: "sampling", "recipe" and "environment".
        begin: ``time.monotonic()`` of the beginning.
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
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    @property
    def report(self) -> Path:
        """The page that says what came out."""
        return self.out / "report.html"


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        scores: a dataclass of numbers.
        seconds: since the beginning, when the scores were there.
        protocol: what the scores depend on.
        lines: the scores as they are told.
    """

    scores: Any
    seconds: float
    protocol: dict[str, Any]
    lines: list[Score]
