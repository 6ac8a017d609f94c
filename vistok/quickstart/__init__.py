"""The whole chain on data that needs no download: digits -> tokenizer -> tokens -> generator -> samples -> scores.

The digits are images, or clips in which they move. The chain uses the public interface: the configs of a system
(``systems/``), :func:`vistok.train.train`, :func:`vistok.train.tokenize.tokenize` and a
:class:`vistok.pipelines.Pipeline`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from vistok.config import load_config
from vistok.pipelines import pipeline
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.runs import data_of_run
from vistok.quickstart.chain import Chain, Outcome, Recipe
from vistok.quickstart.console import Stages, print_summary
from vistok.quickstart.styled import write_conversations
from vistok.quickstart.systems import Stage, System, config_file, find_system, systems
from vistok.text import PromptEncoder, open_text_tokenizer
from vistok.train import train
from vistok.train.environment import environment
from vistok.train.tokenize import tokenize
from vistok.utils.files import write_json

__all__ = ["Recipe", "quickstart"]


def quickstart(
    out: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008 (immutable)
) -> dict[str, Any]:
    """Train, sample, score, and write a report in the folder ``out``; print progress and scores.

    ``out`` gets the runs ``tokenizer/`` and ``generator/`` (which is a pipeline), for clips also ``predictor/``, the
    token cache ``tokens/``, pictures, report.html, and finally result.json.

    Returns:
        The contents of result.json: the fields of ``DigitScores``, ``ClipScores`` or ``TalkScores``, "seconds", and
        under "protocol" everything that the scores depend on.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError: the system is unknown.
        ConfigError: a change in ``recipe`` does not fit the configs.
    """
    begin = time.monotonic()
    name = recipe.system or next(iter(systems()))
    recipe, system = replace(recipe, system=name), find_system(name)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already and is not empty; remove it, or choose another folder with --out")
    predictor = ("predictor",) if system.given_frames else ()
    stages = Stages(("tokenizer", "tokens", "generator", *predictor, "samples", "scores", "report"))
    chain = _train(out, recipe, system, stages, begin)
    shape, medium = chain.pipe.tokenizer.input_shape, "talk" if system.captions else "images"
    medium = "clips" if len(shape) == 4 else medium
    made: Outcome = import_module(f"vistok.quickstart.{medium}").present(chain, stages)
    result = {name: round(value, 4) for name, value in asdict(made.scores).items()}
    result |= {"seconds": round(made.seconds, 1), "protocol": made.protocol}
    write_json(out / "result.json", result)
    print_summary(made.lines, str(chain.report))
    return result


def _train(out: Path, recipe: Recipe, system: System, stages: Stages, begin: float) -> Chain:
    """Train the models of the chain, and write the token cache between them."""
    views = system.views if recipe.views is None else recipe.views
    tokenizer_config = _config("tokenizer", out, recipe, recipe.tokenizer)
    generator_config = _config("generator", out, recipe, recipe.generator)
    predictor_config = _config("predictor", out, recipe, recipe.predictor) if system.given_frames else None

    stages.begin("tokenizer", "learns to write a digit as a few tokens")
    run = train(tokenizer_config)

    stages.begin("tokens", f"of every training digit in {views} slightly different views")
    tokenizer = load_tokenizer(run)
    data = data_of_run(run, (), input_shape=tokenizer.input_shape)
    text = PromptEncoder([open_text_tokenizer("bytes", system.text_length)] if system.text_length else [])
    if system.captions:
        cache = write_conversations(tokenizer, data, out / "tokens", views=views, text=text)
    else:
        cache = tokenize(
            tokenizer, data, out / "tokens", augmentation=f"random:{views}", text=text, given_frames=system.given_frames
        )

    given = "text" if system.text_length else "class"
    stages.begin("generator", f"learns to predict the tokens of each {given}")
    pipe, predictor = pipeline(train(generator_config)), None
    if predictor_config is not None:
        stages.begin("predictor", f"learns to go on from the first {system.given_frames} frames")
        predictor = pipeline(train(predictor_config))
    facts = {"sampling": pipe.sampling, "recipe": asdict(recipe), "environment": environment()}
    return Chain(out, recipe, system, data, pipe, predictor, cache, facts, begin)


def _config(stage: Stage, out: Path, recipe: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    """The config of a stage; everything that the stage reads and writes is inside ``out``."""
    config = load_config(config_file(str(recipe.system), stage), overrides)
    config |= {"output_dir": str(out / stage), "seed": recipe.seed}
    if stage == "tokenizer":
        config["data"] = {**config["data"], "seed": recipe.seed}
    else:
        config["tokens"] = str(out / "tokens")
    return config
