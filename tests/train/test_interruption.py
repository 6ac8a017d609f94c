"""Runs that end before their time: killed, stopped, out of disk, diverged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.images import fill_folder
from support.processes import SECONDS, end, wait_until
from support.tiny_models import tiny
from support.tiny_runs import GAN, generator_config, losses_of, saved_steps, tokenizer_config, write_tokens

import vistok
from vistok.checkpoints import CheckpointError
from vistok.cli import main
from vistok.config import save_config
from vistok.data.loader import TooManyUnreadableError
from vistok.data.sources import DigitsSource
from vistok.train import TrainingDivergedError, TrainingInterrupted, train
from vistok.train.checkpoints import Checkpoints
from vistok.train.monitor import CodebookWatch, read_metrics
from vistok.train.stopping import StopRequest

LONG = {"max_steps": 60, "save_every": 7, "log_every": 5, "image_every": 20}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


def start(config: dict, *options: str, start_new_session: bool = False) -> subprocess.Popen:
    """``vistok train`` in a process of its own."""
    path = Path(config["output_dir"]).with_suffix(".yaml")
    save_config(config, path)
    command = [sys.executable, "-m", "vistok", "train", str(path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=start_new_session)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    if not wait_until(lambda: metrics.exists() and any(r["step"] >= step for r in read_metrics(metrics)), process):
        pytest.fail(process.communicate(timeout=SECONDS)[1][-2000:])


def same_weights(one: Path, other: Path, part: str) -> bool:
    states = [vistok.load(folder / part).state_dict() for folder in (one, other)]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_killed_at_any_moment(tmp_path, tokens, stage):
    def config(name: str) -> dict:
        if stage == "tokenizer":
            return tokenizer_config(tmp_path / name, losses={"gan": GAN | {"start_step": 9}}, training=LONG)
        return generator_config(tmp_path / name, tokens, training=LONG | {"image_every": 0})

    moment = random.Random(stage)  # seeded, so that a failure can be repeated
    whole = train(config("whole"))
    process = start(config("part"))
    wait_for_step(process, tmp_path / "part", moment.randrange(15, 30))
    time.sleep(moment.random() * 0.1)
    end(process)
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


def with_loader_worker(folder: Path) -> dict:
    """A run that trains until it is stopped, and reads its data in one more process."""
    config = tokenizer_config(folder, training=LONG | {"max_steps": 100000, "save_every": 0, "image_every": 0})
    config["data"]["num_workers"] = 1
    return config


def loader_workers(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_signals_to_the_whole_process_group_twice(tmp_path):
    process = start(with_loader_worker(tmp_path / "run"), start_new_session=True)
    wait_for_step(process, tmp_path / "run", 5)
    for _ in range(2):  # one from a scheduler, one forwarded by a launcher
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "stopped by SIGTERM after step" in printed
    assert len(saved_steps(tmp_path / "run")) == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_killed_loader_worker_is_named_with_the_last_checkpoint(tmp_path):
    config = with_loader_worker(tmp_path / "run")
    config["training"]["save_every"] = 5
    process = start(config)
    wait_for_step(process, tmp_path / "run", 10)
    [worker] = loader_workers(process)
    os.kill(worker, signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"a process that reads data (pid {worker}) was killed by SIGKILL" in printed
    assert "lower data.num_workers" in printed
    assert (
        f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / saved_steps(tmp_path / 'run')[-1]}" in printed
    )
    assert "Traceback" not in printed


def test_workers_do_not_keep_python_from_exiting(tmp_path):
    code = (
        "from vistok.data import DataConfig, open_source, training_loader\n"
        "config = DataConfig(16, source='digits', channels=1, batch_size=4, num_workers=1)\n"
        "batches = iter(training_loader(open_source(config), config))\n"
        "next(batches)\n"
        "raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3


def test_only_a_second_ctrl_c_interrupts():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("step_seconds", "exchanges"), [(0.01, 5), (0.5, 11), (5.0, 41)])
def test_processes_exchange_stop_requests_every_two_seconds_or_ten_steps(monkeypatch, step_seconds, exchanges):
    clock, asked = [0.0], []
    monkeypatch.setattr("vistok.train.stopping.time.monotonic", lambda: clock[0])

    def gather(own: torch.Tensor) -> torch.Tensor:
        asked.append(clock[0])
        return own

    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)
    with StopRequest(1000) as stop:
        for step in range(1001, 1042):
            clock[0] += step_seconds
            assert not stop.agreed(step, two)
        signal.raise_signal(signal.SIGTERM)
    assert len(asked) == exchanges
    assert max(later - earlier for earlier, later in pairwise(asked)) <= max(2, step_seconds)


def test_processes_that_were_not_asked_stop_with_the_one_that_was():
    other = torch.tensor([[float(signal.SIGTERM), 1.0]])
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=lambda own: torch.cat([own, other]))
    stop = StopRequest(6)
    assert stop.agreed(7, two)
    assert stop.signal == signal.SIGTERM


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


def test_only_errors_of_the_writer_are_a_full_disk(tmp_path, monkeypatch):
    def no_device(*arguments):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    monkeypatch.setattr(torch, "save", no_device)
    with pytest.raises(RuntimeError, match="killed by signal"):
        Checkpoints(tmp_path, 1, "loss").save(1, {}, None, tiny("vit_vqgan"))
    monkeypatch.undo()
    monkeypatch.setattr("vistok.train.checkpoints.STATE", "/dev/full")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written.*Free some space"):
        Checkpoints(tmp_path, 1, "loss").save(1, {"a": torch.zeros(10000)}, None, tiny("vit_vqgan"))


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
            patch.setattr("vistok.checkpoints.model.save_file", full)
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
    from vistok.train.tasks.tokenizer import TokenizerTask

    original, seen = TokenizerTask.losses, []

    def losses(self, players, batch, clock):
        for turn in original(self, players, batch, clock):
            if clock.step == 4:
                seen.extend(batch.indices.tolist())
                turn = turn._replace(loss=turn.loss * float("nan"))
            yield turn

    monkeypatch.setattr(TokenizerTask, "losses", losses)
    # The window of ten steps ends after the run, so that only the check itself can find the step.
    with pytest.raises(TrainingDivergedError) as caught:
        train(tokenizer_config(tmp_path / "run", training={"log_every": 10}))
    name = DigitsSource(split="train").name(seen[0])
    assert f"loss is nan in step 5, on {name}" in str(caught.value)
    assert "and 8 more" in str(caught.value)
    assert f"all of them: {tmp_path / 'run' / 'diverged.json'}" in str(caught.value)
    [report] = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert (report["step"], report["name"], report["value"]) == (5, "loss", "nan")
    assert report["samples"] == [DigitsSource(split="train").name(index) for index in seen]
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


def test_dying_codes_of_a_quantizer_by_name_get_its_own_remedies(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(CodebookWatch, "PATIENCE", 2)
    monkeypatch.setattr(CodebookWatch, "SHARE", 1.1)
    quantizer = {"name": "vq", "codebook_size": 32, "normalize": False}
    with caplog.at_level("WARNING", logger="vistok"):
        train(tokenizer_config(tmp_path / "run", model={"quantizer": quantizer}))
    assert "model.quantizer.restart_after=100" in caplog.text
    assert "model.quantizer.normalize=true" in caplog.text
    assert "model.codebook" not in caplog.text


def test_codebook_watch_waits_and_forgives():
    watch = CodebookWatch(1.0, ["restart"])
    usages = dict.fromkeys(range(100, 2000, 100), 0.05) | {300: 0.5}
    warned = {step: watch.update(step, usage) for step, usage in sorted(usages.items())}
    assert [step for step, text in warned.items() if text] == [900]
    assert "since step 400" in warned[900]


def test_codebook_watch_goes_on_after_a_resume(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(CodebookWatch, "PATIENCE", 4)
    monkeypatch.setattr(CodebookWatch, "SHARE", 1.1)
    for steps in (4, 8, 12):  # the warning is due at step 5, and was given before step 12
        with caplog.at_level("WARNING", logger="vistok"):
            train(tokenizer_config(tmp_path / "run", training={"max_steps": steps}), resume=steps > 4)
    assert caplog.text.count("the codebook is dying") == 1
    assert "since step 1," in caplog.text


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


def test_unreadable_images_are_remembered_by_a_resumed_run(tmp_path, caplog):
    fill_folder(tmp_path / "photos", {"ant": 101})
    (tmp_path / "photos" / "ant" / "007.png").write_bytes(b"no image")
    data = {"source": "folder", "root": str(tmp_path / "photos"), "channels": 3, "batch_size": 20, "affine": None}
    for steps in (5, 6):  # one epoch reads it, the first step of the next does not
        caplog.clear()
        with caplog.at_level("WARNING", logger="vistok"):
            train(tokenizer_config(tmp_path / "run", data=data, training={"max_steps": steps}), resume=steps > 5)
    assert "left out, cannot be read" not in caplog.text
    assert "1 samples could not be read and were left out of training" in caplog.text


def test_too_many_unreadable_images_stop_the_run_with_the_list(tmp_path):
    fill_folder(tmp_path / "photos", {"ant": 101})
    for number in (7, 9):
        (tmp_path / "photos" / "ant" / f"{number:03d}.png").write_bytes(b"no image")
    data = {"source": "folder", "root": str(tmp_path / "photos"), "channels": 3, "batch_size": 20, "affine": None}
    with pytest.raises(TooManyUnreadableError, match=r"(?s)2 of 101 samples .*(007|009)\.png"):
        train(tokenizer_config(tmp_path / "run", data=data, training={"max_steps": 10}))
