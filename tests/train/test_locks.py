"""Two commands that would write one folder: the second is refused, and the first is not disturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.processes import SECONDS, end, first_line
from support.tiny_runs import tokenizer_config, write_tokens

from vistok.data import DataConfig
from vistok.pipelines.folders import load_tokenizer
from vistok.train import train
from vistok.train.tokenize import tokenize
from vistok.utils.locks import FolderInUseError, locked

pytestmark = pytest.mark.slow

HOLDER = """
import sys, time
from vistok.utils.locks import locked
with locked(sys.argv[1]):
    print(1, flush=True)
    time.sleep(99)
"""


@pytest.fixture
def in_use(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    first_line(process)
    yield tmp_path / "out"
    end(process)


@pytest.mark.parametrize("resume", [False, True])
def test_training_into_a_folder_in_use(in_use: Path, resume: bool):
    half_written = in_use / ".x.partial"
    half_written.parent.mkdir()
    half_written.touch()
    with pytest.raises(FolderInUseError, match=r"out is in use: process \d+ on "):
        train(tokenizer_config(in_use), resume=resume)
    assert [path.name for path in in_use.iterdir()] == [".x.partial"]


def test_tokenizing_into_a_folder_in_use(in_use: Path, tmp_path: Path):
    tokenizer = load_tokenizer(write_tokens(tmp_path / "tokens"))
    for resume in (False, True):
        with pytest.raises(FolderInUseError, match="is in use"):
            tokenize(tokenizer, DataConfig(16, source="digits", channels=1, limit=20), in_use, resume=resume)


def test_a_second_training_on_the_command_line(tmp_path: Path):
    config = tokenizer_config(tmp_path / "run", training={"max_steps": 100_000, "save_every": 0, "image_every": 0})
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "vistok", "train", str(tmp_path / "x.yaml")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first_line(first, "step 1/")
    first.send_signal(signal.SIGSTOP)  # it holds its lock, and leaves the processor to the others
    for extra in ([], ["--resume"]):
        second = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=SECONDS)
        assert second.returncode == 2
        assert f"process {first.pid} on " in second.stderr
        assert "Traceback" not in second.stderr
    assert first.poll() is None
    end(first)
    with locked(tmp_path / "run"):  # which the dead process no longer holds
        pass


def test_a_lock_inside_the_folder_is_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If nothing can be written beside a folder, as in a container where only the folder is writable."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (tmp_path / "run").mkdir()
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 1, "image_every": 0}))
    assert (folder / "metrics.jsonl").exists()
    assert not [path.name for path in tmp_path.rglob(".*")]


def test_an_output_folder_that_vanishes_is_one_message(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    import shutil

    from vistok.cli import main
    from vistok.train.loop import Trainer

    original = Trainer.optimise

    def optimise(self, batches):
        if self.step == 2:
            shutil.rmtree(self.folder)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "optimise", optimise)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tokenizer_config(tmp_path / "run")))
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tmp_path / "x.yaml")])
    assert stop.value.code == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_tokenizing_on_a_full_disk_is_one_message(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    import errno

    from vistok.cli import main
    from vistok.data import token_writer

    def full(path, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write_tokens(tmp_path / "made")
    monkeypatch.setattr(token_writer, "atomic_file", full)
    overrides = ["data.source=digits", "data.channels=1", "data.limit=20"]
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", str(tmp_path / "made"), "--out", str(tmp_path / "out"), *overrides])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert "free some space" in printed.lower()
    assert not (tmp_path / "out").exists()
