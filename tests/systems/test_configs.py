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
from vistok.types import ConditionSpec, FeatureSpec, IdSpec, TokenSpec, to_json

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
GRID = {"cifar10": 8, "emoji": 8, "imagenet256": 16, "imagenet512": 16, "datacomp256": 16}
LENGTH = {"moving_digits": 64, "ucf101": 1024, "k600": 1024}
"""Tokens of a clip."""
SCALES = {8: (1, 2, 3, 4, 6, 8), 16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
"""Of multi-scale tokens, by the side of the last grid."""


def test_there_are_configs():
    assert len(FILES) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_builds(path):
    text = path.read_text()
    missing = [
        f"{key}=somewhere"
        for key in ("data.root", "data.target_root", "tokens", "text.encoder")
        if f"{key.split('.')[-1]}: ???" in text
    ]
    run = RunConfig.parse(load_config(path, missing))
    with torch.device("meta"):
        if run.task == "tokenizer":
            model = run.build_model(run.model_entry().load().arguments_from(run.data))
            assert isinstance(model, Tokenizer)
            check_terms(model, run.losses)
            gan_config(model, run.losses)
        else:
            kind = run.model_entry().load()
            if path.parent.name in LENGTH:
                spec = TokenSpec(LENGTH[path.parent.name], 1024, dim=8)
            else:
                side = GRID.get(path.parent.name) or int(path.stem.rpartition("_")[2]) // 16
                bits = sum(run.model.get("factorized_bits", (10,)))
                codebook_size = None if issubclass(kind, ContinuousGenerator) else 2**bits
                spec = TokenSpec(side * side, codebook_size, dim=8, grid=(side, side))
                if kind.needs_tokenizer and codebook_size:
                    scales = [(n, n) for n in SCALES[side]]
                    spec = TokenSpec(sum(n * n for n, _ in scales), 1024, dim=8, scales=scales)
            given = ConditionSpec(10, IdSpec(256, 64), FeatureSpec(384, 16), IdSpec(1024, spec.length))
            condition = given.only(("labels",) if run.condition is None else run.condition)
            model = run.build_model({"spec": to_json(spec), **kind.condition_arguments(condition)})
            model.options_type(**run.sampling)
    assert run.output_dir.startswith("runs/")
