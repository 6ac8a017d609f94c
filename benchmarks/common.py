"""Helpers of the benchmark scripts: paths of real data, functions that score samples, and the final report."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RECIPES = ROOT / "vistok" / "train" / "configs"

sys.path.insert(0, str(ROOT))


def find(path: str | None, fallback: str, option: str) -> Path:
    """``path``, or by default a file of the shared folder beside the repository; exits if it does not exist."""
    chosen = Path(path) if path else SHARED / fallback
    if not chosen.exists():
        sys.exit(f"{chosen} is missing; name it with {option}")
    return chosen


def load_instrument(path: Path):
    """Import the module that scores 32 px samples: its ``load()`` returns a classifier with ``features``."""
    specification = importlib.util.spec_from_file_location("instrument", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def digit_scorer() -> Callable[[Any], dict[str, float]]:
    """What scores generated digits (a pipeline's output): the share that a classifier recognises as the class asked
    for, and the Frechet distance to the training digits on its features. It is fitted to real digits here."""
    import torch

    from vistok.eval.metrics import frechet_distance
    from vistok.quickstart.scores import Digits, fit_classifier, load_digits

    real = load_digits("train")
    classifier = fit_classifier(real, steps=600)
    reference = classifier.moments(real).gaussian

    def score(made: Any) -> dict[str, float]:
        generated = Digits(made.pixels, torch.tensor(made.labels))
        distance = frechet_distance(classifier.moments(generated).gaussian, reference)
        return {"recognised": classifier.accuracy(generated), "frechet": distance}

    return score


def use_threads(count: int) -> None:
    """Use ``count`` CPU threads; the script is restarted if it has another number.

    ``torch.set_num_threads`` has a side effect: MKL may then no longer use a single thread inside a parallel region,
    and attention in bfloat16 opens a team of threads for every head, which takes longer than the attention itself.
    """
    if os.environ.get("OMP_NUM_THREADS") != str(count):
        os.environ["OMP_NUM_THREADS"] = str(count)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def finish(name: str, ratios: dict[str, float], figures: dict[str, float | str]) -> None:
    """Print the one line of JSON that every benchmark ends with."""

    def short(value):
        return round(value, 4) if isinstance(value, float) else value

    rounded = {
        key: {k: short(v) for k, v in values.items()} for key, values in (("ratios", ratios), ("figures", figures))
    }
    print(json.dumps({"benchmark": name, **rounded}))
