"""Runs that end before their time: killed, stopped, out of disk, diverged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import fill_folder
from test_train import losses_of, saved_steps
from tiny_runs import GAN, generator_config, tokenizer_config, write_tokens

import vistok
from vistok.cli import main
from vistok.config import save_config
from vistok.data.loader import TooManyUnreadableError
from vistok.data.sources import DigitsSource
from vistok.hub import CheckpointError
from vistok.train import TrainingDivergedError, TrainingInterrupted, train
from vistok.train.monitor import CodebookWatch, read_metrics

LONG = {"max_steps": 60, "save_every": 7, "log_every": 5, "image_every": 20}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


def start(config: dict, *options: str) -> subprocess.Popen:
    """``vistok train`` in a process of its own."""
    path = Path(config["output_dir"]).with_suffix(".yaml")
    save_config(config, path)
    command = [sys.executable, "-m", "vistok", "train", str(path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and any(
            r["step"] >= step for r in read_metrics(folder / "metrics.jsonl")
        ):
            return
        time.sleep(0.01)
    pytest.fail(process.communicate()[1][-2000:])


def same_weights(one: Path, other: Path, part: str) -> bool:
    states = [vistok.load(folder / part).state_dict() for folder in (one, other)]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_killed_at_random_steps(tmp_path, tokens, stage):
    def config(name: str) -> dict:
        if stage == "tokenizer":
            return tokenizer_config(tmp_path / name, losses={"gan": GAN | {"start_step": 9}}, training=LONG)
        return generator_config(tmp_path / name, tokens, training=LONG | {"image_every": 0})

    whole = train(config("whole"))
    process = start(config("part"))
    wait_for_step(process, tmp_path / "part", random.randrange(15, 30))
    time.sleep(random.random() * 0.1)
    process.kill()
    process.communicate()
    steps = [int(name[5:]) for name in saved_steps(tmp_path / "part")]
    assert steps
    assert 60 not in steps, "it must be killed before its end"
    part = train(config("part"), resume=True)
    assert losses_of(part) == losses_of(whole)
    assert same_weights(part, whole, stage)
    assert not [path for path in part.rglob(".*") if path.name.endswith((".partial", ".old"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(tmp_path, number):
    process = start(tokenizer_config(tmp_path / "part", training=LONG | {"max_steps": 100000, "save_every": 0}))
    wait_for_step(process, tmp_path / "part", 5)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else 130)
    assert "Traceback" not in printed
    assert f"stopped by {number.name} after step" in printed
    assert "--resume" in printed
    [step] = saved_steps(tmp_path / "part")
    assert vistok.load(tmp_path / "part" / "tokenizer")
    if number == signal.SIGTERM:
        end = int(step[5:]) + 5
        resumed = train(tokenizer_config(tmp_path / "part", training=LONG | {"max_steps": end}), resume=True)
        assert read_metrics(resumed / "metrics.jsonl")[-1]["step"] == end


def test_stop_request_in_process_restores_handlers(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stop_at(monkeypatch, 4)
    with pytest.raises(TrainingInterrupted, match=r"SIGTERM after step 5; go on with --resume, from .*step-0000005"):
        train(tokenizer_config(tmp_path / "run"))
    assert signal.getsignal(signal.SIGTERM) is before


def stop_at(monkeypatch, step: int) -> None:
    from vistok.train.loop import Trainer

    original = Trainer.optimise

    def optimise(self, batches):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "optimise", optimise)


def test_windows_that_a_checkpoint_cuts_are_logged_whole(tmp_path, monkeypatch):
    training = {"log_every": 4, "save_every": 0, "max_steps": 8}
    whole = train(tokenizer_config(tmp_path / "whole", training=training))
    config = tokenizer_config(tmp_path / "part", training=training)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(TrainingInterrupted):
            train(config)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (train(config, resume=True), whole)]
    for ours, theirs in zip(*rows, strict=True):
        assert {k: v for k, v in ours.items() if "second" not in k} == {
            k: v for k, v in theirs.items() if "second" not in k
        }


def test_a_torn_metrics_line_and_leftovers_of_a_kill(tmp_path):
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (folder / "checkpoints" / ".step-0000006.x.partial").mkdir()
    resumed = train(tokenizer_config(tmp_path / "run"), resume=True)
    assert [row["step"] for row in read_metrics(resumed / "metrics.jsonl")] == list(range(1, 7))
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize("what", ["metrics", "export"])
def test_full_disk_while_writing(tmp_path, monkeypatch, what):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    config = tokenizer_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        if what == "metrics":
            stop_writing_metrics(patch, 5, full)
        else:
            train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
            patch.setattr("vistok.hub.save_file", full)
        with pytest.raises(CheckpointError, match=r"No space left.*step-000000[36].*--resume"):
            train(config, resume=what == "export")
    assert "step-0000003" in saved_steps(tmp_path / "run")
    assert vistok.load(tmp_path / "run" / "tokenizer")
    whole = train(tokenizer_config(tmp_path / "whole"))
    resumed = train(config, resume=True)
    assert losses_of(resumed) == losses_of(whole)
    assert same_weights(resumed, whole, "tokenizer")


def stop_writing_metrics(patch, step: int, full) -> None:
    from vistok.train.monitor import MetricsFile

    original = MetricsFile.write
    patch.setattr(MetricsFile, "write", lambda self, row: full() if row["step"] == step else original(self, row))


def test_divergence_names_step_files_and_checkpoint(tmp_path, monkeypatch):
    from vistok.train.stages import TokenizerStage

    original, seen = TokenizerStage.losses, []

    def losses(self, model, batch, step):
        loss, terms = original(self, model, batch, step)
        if step == 4:
            seen.extend(batch.indices.tolist())
            loss = loss * float("nan")
        return loss, terms

    monkeypatch.setattr(TokenizerStage, "losses", losses)
    # The window of ten steps ends after the run, so that only the check itself can find the step.
    with pytest.raises(TrainingDivergedError) as caught:
        train(tokenizer_config(tmp_path / "run", training={"log_every": 10}))
    name = DigitsSource(split="train").name(seen[0])
    assert f"loss is nan in step 5, on {name}" in str(caught.value)
    assert "and 8 more" in str(caught.value)
    assert "step-0000003" in str(caught.value)
    assert saved_steps(tmp_path / "run") == ["step-0000003"]


def test_dying_codebook_warns_once_and_names_what_is_not_yet_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(CodebookWatch, "PATIENCE", 2)
    monkeypatch.setattr(CodebookWatch, "SHARE", 1.1)
    with caplog.at_level("WARNING", logger="vistok"):
        train(tokenizer_config(tmp_path / "run", model={"codebook_l2_norm": False, "codebook_restart_after": 50}))
    assert caplog.text.count("the codebook is dying") == 1
    assert "model.codebook_l2_norm=true" in caplog.text
    assert "losses.entropy" in caplog.text
    assert "codebook_restart_after" not in caplog.text


def test_codebook_watch_waits_and_forgives():
    watch = CodebookWatch(1.0, ["restart"])
    usages = dict.fromkeys(range(100, 2000, 100), 0.05) | {300: 0.5}
    warned = {step: watch.update(step, usage) for step, usage in sorted(usages.items())}
    assert [step for step, text in warned.items() if text] == [900]
    assert "since step 400" in warned[900]


def test_the_command_line_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 2)
    save_config(tokenizer_config(tmp_path / "run"), tmp_path / "run.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "run.yaml")])
    assert ended.value.code == 0
    assert "go on with --resume" in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"] == 3


def test_unreadable_images_are_named_again_at_the_end(tmp_path, caplog):
    fill_folder(tmp_path / "photos", {"ant": 101})
    (tmp_path / "photos" / "ant" / "007.png").write_bytes(b"no image")
    data = {"source": "folder", "root": str(tmp_path / "photos"), "channels": 3, "batch_size": 20, "affine": None}
    with caplog.at_level("WARNING", logger="vistok"):
        train(tokenizer_config(tmp_path / "run", data=data, training={"max_steps": 10}))
    assert caplog.text.count("left out, cannot be read") == 1
    assert "1 samples could not be read and were left out of training" in caplog.text
    assert "007.png" in caplog.text.rpartition("left out of training")[2]


def test_too_many_unreadable_images_stop_the_run_with_the_list(tmp_path):
    fill_folder(tmp_path / "photos", {"ant": 101})
    for number in (7, 9):
        (tmp_path / "photos" / "ant" / f"{number:03d}.png").write_bytes(b"no image")
    data = {"source": "folder", "root": str(tmp_path / "photos"), "channels": 3, "batch_size": 20, "affine": None}
    with pytest.raises(TooManyUnreadableError, match=r"(?s)2 of 101 images .*(007|009)\.png"):
        train(tokenizer_config(tmp_path / "run", data=data, training={"max_steps": 10}))
