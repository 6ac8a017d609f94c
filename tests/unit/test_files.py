"""Folders and files are replaced whole, even if a process is killed; a folder has one writer."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.processes import SECONDS, first_line

from vistok.utils import files
from vistok.utils.files import atomic_folder, remove_leftovers, restore
from vistok.utils.locks import FolderInUseError, locked

KILLED = """
import os, shutil, sys
from pathlib import Path
from vistok.utils import files

countdown, exchange, target = int(sys.argv[1]), sys.argv[2] == "exchange", Path(sys.argv[3])

def deadly(function):
    def killed_before(*arguments, **options):
        global countdown
        countdown -= 1
        if countdown == 0:
            os._exit(9)
        return function(*arguments, **options)
    return killed_before

os.replace, os.chmod, shutil.rmtree = deadly(os.replace), deadly(os.chmod), deadly(shutil.rmtree)
os.unlink, os.fsync, os.mkdir = deadly(os.unlink), deadly(os.fsync), deadly(os.mkdir)
files._exchange = deadly(files._exchange) if exchange else lambda *_: False
with files.atomic_folder(target, replace=True) as folder:
    for name in ("a", "b"):
        (folder / name).write_text("new")
"""


def state(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "b")]


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_whatever_the_moment_of_a_kill_old_or_new_is_there(tmp_path: Path, how: str):
    codes, seen = [], []
    for countdown in range(1, 60):
        folder = tmp_path / f"run-{countdown}" / "tokenizer"
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            (folder / name).write_text("old")
        command = [sys.executable, "-c", KILLED, str(countdown), how, str(folder)]
        codes.append(subprocess.run(command, check=False, timeout=SECONDS).returncode)
        if how == "exchange":
            assert folder.exists(), "there is no moment without the folder"
        restore(folder.parent)
        seen.append(state(folder))
        assert seen[-1] in (["old", "old"], ["new", "new"])
        with atomic_folder(folder, replace=True) as again:  # and the next call works
            for name in ("a", "b"):
                (again / name).write_text("newer")
        assert state(folder) == ["newer", "newer"]
        remove_leftovers(folder.parent)
        assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]
        if codes[-1] == 0:
            break
    assert codes[-1] == 0, "the last one must not be killed"
    assert set(codes[:-1]) == {9}
    assert len(codes) > 5
    assert ["old", "old"] in seen
    assert seen[-1] == ["new", "new"]


def test_a_loader_puts_back_what_a_killed_process_set_aside(tmp_path: Path):
    from vistok.checkpoints import load
    from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN

    tiny = ViTConfig(dim=16, num_layers=1, num_heads=1, mlp_dim=16)
    ViTVQGAN(16, 8, tiny, tiny, 32, 4).save_pretrained(tmp_path / "run" / "tokenizer")
    retired = tmp_path / "run" / ".tokenizer.abc123.old"
    retired.mkdir()
    (tmp_path / "run" / "tokenizer").rename(retired / "old")
    assert load(tmp_path / "run" / "tokenizer").registry_name == "vit_vqgan"


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    replace = os.replace

    def full(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"), atomic_folder(tmp_path / "x", replace=True) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "x" / "a").read_text() == "old"


HOLDER = """
import os, sys, time
from vistok.utils.locks import locked
with locked(sys.argv[1]):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert first_line(process) == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=SECONDS)


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen]:
    """The process that holds the lock of the folder meanwhile."""
    process = holder(folder)
    try:
        yield process
    finally:
        end(process)


def test_a_living_owner_is_named(tmp_path: Path):
    with held(tmp_path / "run") as process:
        for name in (tmp_path / "run", tmp_path / "x" / ".." / "run"):
            with (
                pytest.raises(
                    FolderInUseError, match=rf"process {process.pid} on {socket.gethostname()} is writing it"
                ),
                locked(name),
            ):
                pass
        assert process.poll() is None


@pytest.mark.parametrize("how", [(), ("fork",)])
def test_a_dead_owner_holds_nothing(tmp_path: Path, how: tuple[str, ...]):
    """Even if a child process, such as a data worker, lives on with its open files."""
    process = holder(tmp_path / "run", *how)
    process.kill()
    process.wait(timeout=SECONDS)
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.owner").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    if how:
        end(process)


def test_of_another_host_nothing_is_assumed(tmp_path: Path):
    with held(tmp_path / "run"):
        owner = tmp_path / ".run.owner"
        there = json.loads(owner.read_text()) | {"host": "elsewhere", "started": 0.0}  # here it would count as dead
        owner.write_text(json.dumps(there))
        with pytest.raises(FolderInUseError, match="on elsewhere is writing it"), locked(tmp_path / "run"):
            pass


def test_a_killed_owner_that_nobody_has_waited_for_is_dead(tmp_path: Path):
    process = holder(tmp_path / "run", "fork")
    process.kill()  # and not waited for: it stays a zombie
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path / "run"):
        pass
    end(process)


@pytest.mark.parametrize("where", ["container", "machine"])
def test_of_another_machine_with_the_same_host_name_nothing_is_assumed(tmp_path: Path, where: str):
    with held(tmp_path / "run"):
        owner = tmp_path / ".run.owner"
        there = json.loads(owner.read_text())
        assert there["space"] or sys.platform != "linux"
        owner.write_text(json.dumps(there | {"space": where, "pid": 2**22 + 1}))  # a pid that is free here
        with pytest.raises(FolderInUseError, match="is writing it"), locked(tmp_path / "run"):
            pass


def test_an_owner_that_is_no_process_is_not_known_to_be_dead(tmp_path: Path):
    with held(tmp_path / "run"):
        owner = tmp_path / ".run.owner"
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"pid": -1}))
        with pytest.raises(FolderInUseError, match="is writing it"), locked(tmp_path / "run"):
            pass


def test_a_pid_that_is_somebody_else_s_by_now_holds_nothing(tmp_path: Path):
    process = holder(tmp_path / "run", "fork")
    owner = json.loads((tmp_path / ".run.owner").read_text())
    process.kill()
    process.wait(timeout=SECONDS)
    (tmp_path / ".run.owner").write_text(json.dumps(owner | {"pid": os.getppid()}))
    with locked(tmp_path / "run"):
        pass
    end(process)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the beginning of a process is told by the clock")
def test_setting_the_clock_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """psutil derives the start time of a process from the boot time by the present clock."""
    create_time = psutil.Process.create_time
    with held(tmp_path / "run"):
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
        with pytest.raises(FolderInUseError, match="is writing it"), locked(tmp_path / "run"):
            pass


@pytest.mark.parametrize("how", ["a thread", "the same thread"])
def test_a_process_does_not_share_a_lock_with_itself(tmp_path: Path, how: str):
    def enter() -> str:
        try:
            with locked(tmp_path / "run"):
                return "entered"
        except FolderInUseError as error:
            return str(error)

    with locked(tmp_path / "run"):
        if how == "a thread":
            with ThreadPoolExecutor(1) as pool:
                outcome = pool.submit(enter).result()
        else:
            outcome = enter()
        assert f"process {os.getpid()} on" in outcome
        assert (tmp_path / ".run.owner").exists()
    assert enter() == "entered"


def test_a_forked_process_does_not_free_the_lock(tmp_path: Path):
    with locked(tmp_path / "run"):
        inner = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "x")], check=False, timeout=SECONDS)
    assert inner.returncode == 0


FORKED = """
import os, sys
from pathlib import Path
from vistok.utils.locks import FolderInUseError, locked

folder = Path(sys.argv[1])
with locked(folder):
    if os.fork() == 0:
        sys.exit()  # leaves the block in the child
    os.wait()
    assert (folder.parent / ".x.owner").exists()
    if os.fork() == 0:
        try:
            with locked(folder):
                os._exit(1)
        except FolderInUseError:
            os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_told_and_written(tmp_path: Path, monkeypatch, caplog, code: str):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(getattr(errno, code), "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path / "run"):
        assert "take care that no other process writes it" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_made_meanwhile_is_not_replaced(tmp_path: Path):
    def race() -> None:
        with atomic_folder(tmp_path / "x") as folder:
            (folder / "a").write_text("ours")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "a").write_text("theirs")

    with pytest.raises(FileExistsError, match="meanwhile"):
        race()
    assert (tmp_path / "x" / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_two_readers_put_back_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    retired = tmp_path / ".x.abc.old"
    (retired / "old").mkdir(parents=True)
    replace = os.replace

    def after_another(source, target):
        replace(source, target)
        replace(source, target)  # which finds nothing there

    monkeypatch.setattr(os, "replace", after_another)
    restore(tmp_path)
    assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "[" * 100_000, '{"pid": 1e999}'])
def test_a_damaged_owner_file_is_no_obstacle(tmp_path: Path, content: str):
    (tmp_path / ".run.owner").write_text(content)
    (tmp_path / ".run.lock").write_text("")
    with locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_free_after_an_error(tmp_path: Path):
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    with locked(tmp_path / "run"):
        pass


def test_json_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "names.json").write_bytes('["Löwe"]'.encode())
    ask = "import sys; from vistok.utils.files import read_json; print(ascii(read_json(sys.argv[1])))"
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.run(
        [sys.executable, "-c", ask, tmp_path / "names.json"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.strip() == r"['L\xf6we']", told.stderr
