"""What ``vistok train`` can do besides training, and options of the loop that must not change the numbers."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from support.tiny_models import ARGUMENTS, names, tiny, training_loss
from support.tiny_runs import GAN, TINY, generator_config, losses_of, tokenizer_config, write_tokens

from vistok.cli import main
from vistok.config import save_config
from vistok.nn.conv import ResBlock
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.loop import Trainer
from vistok.train.monitor import Console, MetricsFile, read_metrics
from vistok.train.parallel import checkpoint_activations
from vistok.train.preview import preview
from vistok.train.profile import PHASES, profile
from vistok.train.tasks.adversary import Adversary

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_activation_checkpointing_keeps_the_losses(tmp_path, tokens, stage):
    def run(name: str, on: bool):
        training = {"activation_checkpointing": on, "max_steps": 4}
        if stage == "tokenizer":
            return train(tokenizer_config(tmp_path / name, training=training))
        return train(generator_config(tmp_path / name, tokens, training=training))  # with dropout

    assert losses_of(run("on", True)) == losses_of(run("off", False))


def test_activation_checkpointing_recomputes_blocks():
    calls = []
    model = torch.nn.Sequential(ResBlock(8, 8, norm_groups=4), torch.nn.Conv2d(8, 8, 1))
    model[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    keys = list(model.state_dict())
    checkpoint_activations(model)
    assert list(model.state_dict()) == keys
    model(torch.zeros(1, 8, 4, 4)).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(torch.zeros(1, 8, 4, 4))
    assert len(calls) == 3
    with pytest.raises(ConfigError, match="Linear has no repeated blocks"):
        checkpoint_activations(torch.nn.Linear(2, 2))


def test_a_copy_of_a_checkpointed_model_calls_its_own_blocks():
    model = torch.nn.Sequential(ResBlock(8, 8, norm_groups=4))
    checkpoint_activations(model)
    other, images = copy.deepcopy(model), torch.randn(1, 8, 4, 4)
    before = model(images)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(images), before)
    assert torch.equal(other(images), images)  # a residual block of zeros


def test_a_compiled_model_trains_like_a_plain_one(tmp_path, monkeypatch):
    compile_module = torch.nn.Module.compile
    calls = []

    def compile_without_compiler(module: torch.nn.Module) -> None:  # traced and differentiated ahead of time, no more
        calls.append(module)
        compile_module(module, backend="aot_eager")

    def run(name: str, on: bool) -> Path:
        model = {"codebook_restart_after": 1, "entropy_temperature": 0.1}
        training = {"compile": on, "max_steps": 4, "image_every": 0}
        return train(tokenizer_config(tmp_path / name, model=model, losses={"entropy": 0.1}, training=training))

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_compiler)
    plain, compiled = run("plain", False), run("compiled", True)
    assert len(calls) == 1
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-5)
    ours, theirs = (load_file(folder / "tokenizer" / "model.safetensors") for folder in (plain, compiled))
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("name", [*names("tokenizer"), *names("generator")])
def test_activation_checkpointing_of_every_model(name):
    def gradients(on: bool) -> list[torch.Tensor]:
        model = tiny(name).train()
        if on:
            checkpoint_activations(model)
        loss = training_loss(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return [loss, *torch.autograd.grad(loss, trained, allow_unused=True)]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


def test_a_warmup_that_never_ends_is_said(tmp_path, caplog):
    RunConfig.parse(tokenizer_config(tmp_path / "run", lr_scheduler={"warmup_steps": 6}))
    assert "warmup_steps 6 is no less than training.max_steps 6: the learning rate never reaches" in caplog.text
    caplog.clear()
    RunConfig.parse(tokenizer_config(tmp_path / "run", lr_scheduler={"warmup_steps": 5}))
    assert not caplog.text


def test_dry_run_says_what_training_would_take(tmp_path, capsys):
    config = tokenizer_config(tmp_path / "run", losses={"gan": GAN}, training={"gradient_accumulation_steps": 2})
    found = preview(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run.first-batch.png"]
    assert Image.open(found.picture).size == (4 * 18 - 2, 4 * 18 - 2)  # 16 images of 16 pixels
    assert (found.samples_per_epoch, found.units_per_epoch, found.batch_size) == (1433, 1433, 32)
    assert found.epochs == pytest.approx(6 * 32 / 1433)
    assert found.memory["gradients"] == 4 * sum(found.parameters.values())
    assert found.operations > 3 * 32 * found.parameters["model"]
    assert found.memory["optimizer"] == 2 * found.memory["gradients"]
    assert found.memory["averaged weights"] >= 4 * found.parameters["model"]
    less = preview(config | {"training": config["training"] | {"activation_checkpointing": True, "ema_decay": 0.0}})
    assert 0 < less.memory["activations"] < found.memory["activations"]
    assert less.memory["averaged weights"] == 0
    save_config(config, tmp_path / "run.yaml")
    main_exits(["train", str(tmp_path / "run.yaml"), "--dry-run"], 0)
    printed = capsys.readouterr().out
    assert f"{found.parameters['model']:,}" in printed
    assert "run.first-batch.png" in printed
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_generator_decodes_its_tokens(tmp_path, tokens):
    found = preview(generator_config(tmp_path / "run", tokens))
    assert (found.samples_per_epoch, found.units_per_epoch, found.unit) == (200, 800, "tokens")
    assert Image.open(found.picture).size == (70, 70)
    assert not (tmp_path / "run").exists()


def test_activations_grow_with_the_batch(tmp_path):
    small, large = (
        preview(tokenizer_config(tmp_path / "run", data={"batch_size": size})).memory["activations"] for size in (8, 16)
    )
    assert large == pytest.approx(2 * small, rel=0.01)


def test_profile_writes_a_trace_and_a_summary(tmp_path, capsys):
    save_config(tokenizer_config(tmp_path / "run"), tmp_path / "run.yaml")
    main_exits(["train", str(tmp_path / "run.yaml"), "--profile"], 0)
    printed = capsys.readouterr().out
    for phase in ("data wait", "forward", "backward", "optimizer", "images/s"):
        assert phase in printed
    events = json.loads((tmp_path / "run.trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "step" and event.get("cat") == "user_annotation" for event in events) == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["tokenizer", "generator"])
def test_a_profile_tells_what_draws_and_logging_take(tmp_path, monkeypatch, tokens, task):
    row = 0.2
    log = Accelerator.log
    monkeypatch.setattr(Accelerator, "log", lambda *given, **named: (time.sleep(row), log(*given, **named))[1])
    training = {"log_every": 50, "trackers": ["tensorboard"]}
    if task == "tokenizer":
        config = tokenizer_config(tmp_path / "run", training=training)
    else:
        config = generator_config(tmp_path / "run", tokens, training=training)
    found = profile(config)
    assert all(found.seconds[phase] > 0 for phase in PHASES), found.seconds
    assert sum(found.seconds.values()) == pytest.approx(found.step_seconds)
    often = profile(config | {"training": config["training"] | {"log_every": 1}})
    assert often.seconds["logging"] > row > found.seconds["logging"] > row / 50


def test_profiled_steps_are_those_with_an_adversary(tmp_path, monkeypatch):
    steps, forward = [], Adversary.forward
    monkeypatch.setattr(
        Adversary, "forward", lambda self, *given: (steps.append(given[-1].step), forward(self, *given))[1]
    )
    profile(tokenizer_config(tmp_path / "run", losses={"gan": GAN | {"start_step": 1000}}))
    assert steps == list(range(1000, 1007))


def test_a_profile_that_fails_ends_its_trackers(tmp_path, monkeypatch):
    def stop(self, batches):
        raise RuntimeError("out of memory")

    ended = []
    monkeypatch.setattr(Trainer, "optimise", stop)
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ended.append(self))
    with pytest.raises(RuntimeError, match="out of memory"):
        profile(tokenizer_config(tmp_path / "run"))
    assert len(ended) == 1


def test_metrics_are_json_whatever_the_numbers(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1, "loss": 0.5, "grad_norm": float("inf"), "val_loss": float("nan"), "seconds": 1.0})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # of NaN and Infinity
    again = MetricsFile(tmp_path / "metrics.jsonl", 1)
    assert again.seconds() == 1.0
    assert read_metrics(again.path) == [{"step": 1, "loss": 0.5, "grad_norm": None, "val_loss": None, "seconds": 1.0}]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"training": {"gradient_accumulation_steps": 0}}, "training: gradient_accumulation_steps must be at least 1"),
        ({"training": {"batch_size": 0}}, "training: batch_size must be at least 1, got 0"),
        ({"training": {"max_grad_norm": -1.0}}, r"training: max_grad_norm must be at least 0, got -1\.0"),
        ({"training": {"save_every": -1}}, "training: save_every must be at least 0, got -1"),
        ({"lr_scheduler": {"decay_share": 0.0}}, r"lr_scheduler: decay_share must lie in \(0, 1\], got 0"),
        ({"lr_scheduler": {"warmup_steps": -1}}, "lr_scheduler: warmup_steps must be at least 0, got -1"),
        ({"optimizer": {"lr": -1e-4}}, "optimizer: lr must be at least 0, got -0.0001"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer: betas must lie in \[0, 1\)"),
        ({"losses": {"gan": GAN | {"r1_every": 0}}}, r"r1_every must be at least 1, got 0"),
        ({"losses": {"gan": GAN | {"start_step": -1}}}, r"start_step must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, section, message):
    with pytest.raises(ValueError, match=message):
        train(tokenizer_config(tmp_path / "run", **section))
    assert not (tmp_path / "run").exists()


def test_modes_exclude_each_other(tmp_path):
    save_config(tokenizer_config(tmp_path / "run"), tmp_path / "run.yaml")
    main_exits(["train", str(tmp_path / "run.yaml"), "--profile", "--dry-run"], 2)


def main_exits(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install 'vistok\[wandb\]'"):
        train(tokenizer_config(tmp_path / "run", training={"trackers": ["wandb"]}))
    assert not (tmp_path / "run").exists()


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    training = {"trackers": ["tensorboard", "wandb"], "max_steps": 2}
    folder = train(tokenizer_config(tmp_path / "run", training=training))
    assert list((folder / "wandb").rglob("*.wandb"))
    assert list((folder / "tensorboard").rglob("events*"))


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (1, 2):
        training = {"trackers": ["wandb"], "max_steps": steps}
        folder = train(tokenizer_config(tmp_path / "run", training=training), resume=steps == 2)
    ids = [path.stem.removeprefix("run-") for path in (folder / "wandb").rglob("run-*.wandb")]
    assert ids == [(folder / "wandb.id").read_text()] * 2


def test_the_console_line_has_speed_memory_and_time_left(capsys):
    with Console("run", 100, 0, unit="images_per_second", device=torch.device("cpu"), quiet=False) as console:
        console.report(10, {"loss": 0.5, "images_per_second": 1234.0})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"step 10/100  loss 0\.5  1,234 images/s  \d+\.\d\d GiB  \d+ s left\n", printed), printed


def test_no_tracker(tmp_path):
    folder = train(tokenizer_config(tmp_path / "run", training={"trackers": [], "max_steps": 1}))
    assert not (folder / "tensorboard").exists()
    assert (folder / "metrics.jsonl").exists()


def test_runs_of_different_precision_follow_one_another(tmp_path):
    for number, precision in enumerate(("no", "bf16", "no")):
        changes = {"training": {"max_steps": 1, "mixed_precision": precision}}
        folder = train(tokenizer_config(tmp_path / str(number), **changes))
        assert (folder / "tokenizer").is_dir()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vit_vqgan", {"codebook_size": -1}),
        ("vit_vqgan", {"codebook_size": 0}),
        ("vit_vqgan", {"patch_size": 0}),
        ("vit_vqgan", {"num_heads": 0}),
        ("ibq", {"codebook_size": 0}),
        ("llamagen_vq", {"norm_groups": 0}),
        ("llamagen_vq", {"codebook_size": 0}),
        ("flextok", {"num_tokens": -1}),
    ],
)
def test_sizes_of_no_model_are_named(tmp_path, name, wrong):
    tiny = {key: value for key, value in ARGUMENTS[name].items() if key != "image_size"}
    given = {"encoder": TINY | wrong} if "num_heads" in wrong else wrong
    run = RunConfig.parse(tokenizer_config(tmp_path / "run") | {"model": {**tiny, "name": name, **given}})
    with pytest.raises(ValueError, match="|".join(wrong)):
        run.build_model({"image_size": 16})
