"""Runs that go on with another config, other data, or a checkpoint that is not as it was saved."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_runs import TINY, generator_config, saved_steps, tokenizer_config, write_tokens

import vistok
from vistok.checkpoints import CheckpointError
from vistok.data import DataConfig
from vistok.pipelines.folders import load_tokenizer
from vistok.quantizers.vq import VectorQuantizer, with_counts
from vistok.signatures import ConfigError
from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN
from vistok.train import train
from vistok.train.monitor import read_metrics
from vistok.train.tokenize import tokenize

SHORT = {"max_steps": 2, "save_every": 1, "image_every": 0, "keep_checkpoints": 2}
LONGER = SHORT | {"max_steps": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(folder: Path, step: int) -> dict:
    return torch.load(folder / "checkpoints" / f"step-{step:07d}" / "state.pt", weights_only=True)


def warnings_of(caplog: pytest.LogCaptureFixture, config: dict) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(config, resume=True)
    return caplog.text


def test_restarts_of_codes_begin_and_end_in_the_middle_of_a_run(tmp_path, caplog):
    train(tokenizer_config(tmp_path / "run", training=SHORT))
    with_restarts = {"codebook_restart_after": 5}
    text = warnings_of(caplog, tokenizer_config(tmp_path / "run", model=with_restarts, training=LONGER))
    assert "counts of codes that the checkpoint and this run do not share begin afresh: quantizer.restart.idle" in text
    state = state_of(tmp_path / "run", 3)
    for weights in (state["model"], state["average"]["model"]):
        assert weights["quantizer.restart.idle"].max() == 1, (
            "no code counts as unused for longer than this run has seen"
        )
    text = warnings_of(caplog, tokenizer_config(tmp_path / "run", training=LONGER | {"max_steps": 4}))
    assert "are left out: quantizer.restart.idle" in text
    assert "quantizer.restart.idle" not in state_of(tmp_path / "run", 4)["model"]


@pytest.mark.parametrize("movers", [{"restart_after": 3}, {"clustering": True}])
def test_a_trained_codebook_stays_where_it_is_when_counting_begins(movers):
    torch.manual_seed(0)
    trained, goes_on = VectorQuantizer(64, 4), VectorQuantizer(64, 4, **movers)
    state, begun, _ = with_counts(goes_on, trained.state_dict())
    goes_on.load_state_dict(state, strict=True)
    assert len(begun) == 1
    before = goes_on.embedding.weight.clone()
    goes_on.train()(torch.randn(1, 8, 4))  # most codes are not among these
    goes_on.after_backward()
    assert torch.allclose(goes_on.embedding.weight, before, atol=1e-4)


def test_weights_of_a_run_without_restarts_begin_one_with_them(tmp_path):
    first = train(tokenizer_config(tmp_path / "first", training={"max_steps": 1}))
    model = {"codebook_restart_after": 5}
    train(tokenizer_config(tmp_path / "second", model=model, init_from=str(first), training={"max_steps": 1}))


def test_another_scale_of_adapters_is_that_of_the_config(tmp_path, caplog):
    lora = {"rank": 2, "alpha": 2.0}
    train(tokenizer_config(tmp_path / "run", training=SHORT | {"lora": lora}))
    text = warnings_of(caplog, tokenizer_config(tmp_path / "run", training=LONGER | {"lora": lora | {"alpha": 4.0}}))
    assert "resumed with another training.lora.alpha: 2.0 -> 4.0" in text
    state = state_of(tmp_path / "run", 3)
    for weights in (state["model"], state["average"]["model"]):
        assert {float(weights[key]) for key in weights if key.endswith("0.scale")} == {2.0}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


def tokens_of_another_tokenizer(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = ViTVQGAN(16, 8, ViTConfig(**TINY), ViTConfig(**TINY), 32, 4, in_channels=1)
    tokenize(tokenizer, DataConfig(16, source="digits", channels=1, limit=200), folder)
    return folder


def with_other_classes(cache: Path, folder: Path) -> Path:
    shutil.copytree(cache, folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"classes": index["classes"][::-1]}))
    return folder


def test_tokens_that_mean_something_else_are_refused(tmp_path, tokens):
    train(generator_config(tmp_path / "run", tokens, training=SHORT))
    for what, other in (
        ("tokenizer", tokens_of_another_tokenizer(tmp_path / "other")),
        ("classes", with_other_classes(tokens, tmp_path / "renamed")),
    ):
        with pytest.raises(ConfigError, match=f"has tokens of another {what} than those that the checkpoint") as caught:
            train(generator_config(tmp_path / "run", other, training=LONGER), resume=True)
        assert f"the config has another tokens: {tokens} -> {other}" in caught.value.__notes__[0]
    assert load_tokenizer(tmp_path / "run").fingerprint() == load_tokenizer(tokens).fingerprint()


def test_data_that_were_exchanged_are_not_blamed_on_the_checkpoint(tmp_path, tokens):
    shutil.copytree(tokens, tmp_path / "cache")
    train(generator_config(tmp_path / "run", tmp_path / "cache", training=SHORT))
    shutil.rmtree(tmp_path / "cache")
    tokens_of_another_tokenizer(tmp_path / "cache")
    with pytest.raises(ConfigError, match="tokens of another tokenizer") as caught:
        train(generator_config(tmp_path / "run", tmp_path / "cache", training=SHORT), resume=True)
    assert "so its data are others by now. Put them back, or begin a new run" in caught.value.__notes__[0]


def test_a_run_without_a_checkpoint_gets_the_tokenizer_of_its_tokens(tmp_path, tokens, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.run", lambda self: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            train(generator_config(tmp_path / "run", tokens, training=SHORT))
    other = tokens_of_another_tokenizer(tmp_path / "other")
    train(generator_config(tmp_path / "run", other, training=SHORT), resume=True)
    assert load_tokenizer(tmp_path / "run").fingerprint() == load_tokenizer(other).fingerprint()


def test_a_run_goes_on_without_what_it_began_from(tmp_path):
    first = train(tokenizer_config(tmp_path / "first", training={"max_steps": 1}))
    config = tokenizer_config(tmp_path / "run", init_from=str(first), training=SHORT)
    train(config)
    shutil.rmtree(first)
    for changes in ({}, {"model": {}}):  # the model may be that of init_from
        with pytest.raises(CheckpointError) as caught:
            train(config | {"training": LONGER} | changes, resume=True)
        assert f"vistok train {tmp_path / 'run' / 'config.yaml'} --resume init_from=null" in caught.value.__notes__[-1]
    train(config | {"training": LONGER, "init_from": None}, resume=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 3


def edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return damage


def flipped(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(len(content) * share)] ^= 0xFF
        file.write_bytes(content)

    return damage


def without(key: str) -> Callable[[Path], None]:
    return edited(lambda state: state.pop(key))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "text": lambda file: file.write_text("hello\n"),
    "absent": lambda file: file.unlink(),
    "a byte at 30 %": flipped(0.3),
    "a byte at 60 %": flipped(0.6),
    "of another step": lambda file: shutil.copy(file.parent.with_name("step-0000001") / "state.pt", file),
    "a list": lambda file: torch.save([1, 2], file),
    "a step that is a text": edited(lambda state: state.update(step="two")),
    **{f"without {key}": without(key) for key in ("model", "average", "players", "frozen", "loader", "meter", "task")},
    "players of no state": edited(lambda state: state.update(players={"model": None})),
    "a loader of no state": edited(lambda state: state.update(loader=3)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tokenizer_config(tmp_path_factory.mktemp("runs") / "run", training=SHORT))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_can_be_gone_round(tmp_path, run, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(str(run), str(folder)))
    assert saved_steps(folder) == ["step-0000001", "step-0000002"]
    newest = folder / "checkpoints" / "step-0000002"
    damage(newest / "state.pt")
    config = tokenizer_config(folder, training=SHORT)
    with pytest.raises(CheckpointError) as caught:
        train(config, resume=True)
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert f"Remove the folder {newest}: then --resume goes on from {newest.with_name('step-0000001')}" in message
    shutil.rmtree(newest)
    train(config, resume=True)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert vistok.load(folder / "tokenizer")


def test_a_checkpoint_of_another_run_is_named(tmp_path, run):
    other = train(tokenizer_config(tmp_path / "other", model={"codebook_size": 64}, training=SHORT))
    state = other / "checkpoints" / "step-0000002" / "state.pt"
    shutil.copy(run / "checkpoints" / "step-0000002" / "state.pt", state)
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        train(tokenizer_config(other, model={"codebook_size": 64}, training=SHORT), resume=True)
    assert "If the checkpoint is damaged, or of another run: Remove the folder" in caught.value.__notes__[0]
