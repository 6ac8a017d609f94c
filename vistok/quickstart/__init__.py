"""The whole chain on data that needs no download: digits -> tokenizer -> tokens -> generator -> samples -> scores.

Everything goes through the parts that users have: two configs of a system (``systems/``), :func:`vistok.train.train`,
:func:`vistok.train.tokenize.tokenize` and a :class:`vistok.pipelines.Pipeline`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vistok.data.captions import spell_digit
from vistok.data.tokens import TokenCache
from vistok.pipelines import Pipeline, pipeline
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.runs import data_of_run
from vistok.quickstart.console import Stages, print_summary
from vistok.quickstart.recipe import Recipe
from vistok.quickstart.scores import CLASSES, COPIES, Digits, equal_counts, fit_classifier, load_digits, score
from vistok.quickstart.story import draw, score_lines, write_story
from vistok.quickstart.systems import find_system, systems
from vistok.quickstart.talk import converse
from vistok.text import PromptEncoder, open_text_tokenizer
from vistok.train import train
from vistok.train.environment import environment
from vistok.train.tokenize import tokenize
from vistok.utils.files import write_json

__all__ = ["Recipe", "quickstart"]

DEFAULT = Recipe()


def quickstart(out: str | Path, recipe: Recipe = DEFAULT) -> dict[str, Any]:
    """Train, sample, score, and report in the folder ``out``, and say so on standard output.

    ``out`` gets the runs ``tokenizer/`` and ``generator/`` (which is a pipeline), the token cache ``tokens/``,
    pictures, report.html, and at last result.json.

    Returns:
        what result.json holds: the fields of ``Scores``, or of ``TalkScores``, "seconds", and how they came about under
        "protocol".

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError: an unknown system.
        ConfigError: a change in ``recipe`` that does not fit the configs.
    """
    begin = time.monotonic()
    recipe = replace(recipe, system=recipe.system or next(iter(systems())))
    system = find_system(recipe.system)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already and is not empty; remove it, or choose another folder with --out")
    if system.captions:
        return converse(out, recipe, begin)
    stages = Stages(("tokenizer", "tokens", "generator", "samples", "scores", "report"))
    views = system.views if recipe.views is None else recipe.views
    pipe, cache = _train(out, recipe, views, system.text_length, stages)

    stages.begin("samples", f"{recipe.samples_per_class} digits of each class")
    if system.text_length:
        what = {"prompt": [spell_digit(digit)[0] for digit in range(CLASSES)]}
    else:
        what = {"class_labels": list(range(CLASSES))}
    samples = pipe(**what, num_images_per_label=recipe.samples_per_class, seed=recipe.seed, batch_size=250)
    generated = Digits(samples.pixels, torch.arange(CLASSES).repeat_interleave(recipe.samples_per_class))

    stages.begin("scores", "by a classifier that is fitted to real digits now")
    real, held_out = load_digits("train"), load_digits("test")
    scores = score(
        generated,
        samples.tokens,
        classifier=fit_classifier(real, steps=recipe.classifier_steps, seed=recipe.seed),
        tokenizer=pipe.tokenizer,
        cache=cache,
        train=real,
        test=held_out,
    )

    stages.begin("report", "pictures and curves")
    pictures = draw(generated, real, held_out, tokenizer=pipe.tokenizer, runs=(out / "tokenizer", out / "generator"))
    pictures.save(out)
    protocol = {
        "data": "scikit-learn's digits, 8x8 resized to 32x32; the last fifth of each class is held out",
        "classifier": "a small convolutional network, fitted to augmented real training digits only",
        "training_digits": len(real),
        "held_out_digits": len(held_out),
        "generated_digits": len(generated),
        "frechet_digits": int(equal_counts(generated, held_out).sum()),
        "copies": COPIES[pipe.tokenizer.spec.discrete],
        "sampling": pipe.sampling,
        "recipe": asdict(recipe),
        "environment": environment(),
    }
    seconds = time.monotonic() - begin
    lines = score_lines(scores, seconds, system, spec=pipe.tokenizer.spec)
    write_story(out / "report.html", pictures, lines, system=system, spec=pipe.tokenizer.spec, protocol=protocol)
    result = {name: round(value, 4) for name, value in asdict(scores).items()}
    result |= {"seconds": round(seconds, 1), "protocol": protocol}
    write_json(out / "result.json", result)
    print_summary(lines, str(out / "report.html"))
    return result


def _train(out: Path, recipe: Recipe, views: int, text_length: int, stages: Stages) -> tuple[Pipeline, TokenCache]:
    """Both trainings, and the token cache between them."""
    tokenizer_config, generator_config = recipe.config("tokenizer", out), recipe.config("generator", out)

    stages.begin("tokenizer", "learns to write a 32x32 digit as a few tokens")
    run = train(tokenizer_config)

    stages.begin("tokens", f"of every training digit in {views} slightly different views")
    tokenizer = load_tokenizer(run)
    data = data_of_run(run, (), input_shape=tokenizer.input_shape)
    text = PromptEncoder([open_text_tokenizer("bytes", text_length)] if text_length else [])
    cache = tokenize(tokenizer, data, out / "tokens", augmentation=f"random:{views}", text=text)

    given = "text" if text_length else "class"
    stages.begin("generator", f"learns to predict the tokens of each {given}")
    return pipeline(train(generator_config)), cache
