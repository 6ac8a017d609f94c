"""Every shipped YAML loads, passes the config check, and builds its model at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vistok.config import load_config
from vistok.generators.engine.continuous import ContinuousGenerator
from vistok.tokenizers.base import Tokenizer
from vistok.train.config import RunConfig
from vistok.train.tasks.objective import check_terms
from vistok.train.tasks.tokenizer import gan_config
from vistok.types import TokenSpec, to_json

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
GRID = {"cifar10": 8, "imagenet256": 16, "datacomp256": 16}


def test_there_are_configs():
    assert len(FILES) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_builds(path):
    text = path.read_text()
    missing = [f"{key}=somewhere" for key in ("data.root", "tokens") if f"{key.split('.')[-1]}: ???" in text]
    run = RunConfig.parse(load_config(path, missing))
    with torch.device("meta"):
        if run.task == "tokenizer":
            model = run.build_model(run.model_entry().load().arguments_from(run.data))
            assert isinstance(model, Tokenizer)
            check_terms(model, run.losses)
            gan_config(model, run.losses)
        else:
            side = GRID[path.parent.name]
            continuous = issubclass(run.model_entry().load(), ContinuousGenerator)
            spec = TokenSpec(side * side, None if continuous else 1024, dim=8, grid=(side, side))
            model = run.build_model({"spec": to_json(spec), "num_classes": 10})
            model.options_type(**run.sampling)
    assert run.output_dir.startswith("runs/")
