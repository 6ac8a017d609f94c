"""Values of a training config that would train something else, or fail after the work: refused at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import generator_config, tokenizer_config, write_tokens

from vistok.checkpoints import CheckpointError
from vistok.signatures import ConfigError
from vistok.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling": {"top_k": -1}}, "sampling: top_k must be"),
        ({"sampling": {"top_p": 0.0}}, "sampling: top_p must lie"),
        ({"sampling": {"temperature": -1.0}}, "sampling: temperature must be"),
        ({"sampling": {"guidance_scale": -1.0}}, "sampling: guidance_scale must be"),
        ({"model": {"condition_dropout": 1.5}}, "condition_dropout is a share"),
        ({"model": {"condition_dropout": -1.0}}, "condition_dropout is a share"),
        ({"model": {"attn_dropout": 2.0}}, "dropout"),
    ],
)
def test_options_of_a_generator(changes, told, tokens, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=told):
        train(generator_config(tmp_path / "run", tokens, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", [-1.0, {"weight": -0.5}])
def test_weights_of_losses_are_not_negative(weight, tmp_path):
    with pytest.raises((ConfigError, CheckpointError, ValueError), match="weight must be finite and not negative"):
        train(tokenizer_config(tmp_path / "run", losses={"l2": weight}))
    assert not (tmp_path / "run").exists()
