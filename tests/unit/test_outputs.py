"""Folders that take long to fill: collected ones appear when complete, continued ones keep one record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vistok.utils.locks import FolderInUseError
from vistok.utils.outputs import PLAN, ResumeError, collected, continued, unfinished

SEVEN = {"seed": 7, "sampling": {"steps": [1, 2]}}


class BrokenDataError(ValueError):
    pass


def fill(target: Path, *, files: int, resume: bool = False, settings=SEVEN, error: Exception | None = None) -> None:
    with collected(target, settings, resume=resume, hopeless=BrokenDataError) as folder:
        for number in range(files):
            (folder / f"{number}.txt").write_text("whole")
        (folder / "empty").mkdir(exist_ok=True)
        if error:
            raise error


def test_a_collected_folder_appears_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError) as failed:
        fill(target, files=1, error=RuntimeError("no power"))
    assert not target.exists()
    assert f"lies in {unfinished(target)}" in failed.value.__notes__[0]
    assert "--resume" in failed.value.__notes__[0]
    fill(target, files=2, resume=True)
    assert sorted(path.name for path in target.iterdir()) == ["0.txt", "1.txt", "empty"]
    assert not unfinished(target).exists()
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        fill(target, files=1)


def test_nothing_stays_of_a_run_that_wrote_no_file(tmp_path: Path):
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", files=0, error=RuntimeError("at once"))
    assert list(tmp_path.iterdir()) == []


def test_what_would_come_again_is_not_to_be_resumed(tmp_path: Path):
    with pytest.raises(BrokenDataError) as failed:
        fill(tmp_path / "out", files=1, error=BrokenDataError("unreadable"))
    assert "begin anew" in failed.value.__notes__[0]


@pytest.mark.parametrize("other", [{"seed": 8}, {"sampling": {"steps": [1]}}, {"more": True}, {"seed": None}])
def test_a_folder_goes_on_with_its_own_settings_alone(tmp_path: Path, other: dict):
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", files=1, error=RuntimeError("no power"))
    (key,) = other
    with pytest.raises(ResumeError, match=f"begun with another {key}: {key} was "):
        fill(tmp_path / "out", files=1, resume=True, settings=SEVEN | other)
    with continued(tmp_path / "kept", SEVEN | other):
        pass
    with pytest.raises(ResumeError, match=f"begun with another {key}"), continued(tmp_path / "kept", SEVEN):
        pass


def test_nothing_to_resume(tmp_path: Path):
    with pytest.raises(ResumeError, match="nothing to resume"):
        fill(tmp_path / "out", files=1, resume=True)


def test_a_continued_folder_keeps_its_record(tmp_path: Path):
    folder = tmp_path / "out"

    def fail() -> None:
        with continued(folder, SEVEN):
            (folder / "part.txt").write_text("whole")
            raise RuntimeError("no power")

    with pytest.raises(RuntimeError) as failed:
        fail()
    assert "the same command goes on" in failed.value.__notes__[0]
    with continued(folder, SEVEN) as again:
        assert (again / "part.txt").read_text() == "whole"
        with pytest.raises(FolderInUseError), continued(folder, SEVEN):
            pass
    assert json.loads((folder / PLAN).read_text()) == SEVEN


def test_nothing_stays_of_a_continued_folder_that_no_file_came_to(tmp_path: Path):
    folder = tmp_path / "out"

    def fail() -> None:
        with continued(folder, SEVEN):
            (folder / "parts").mkdir()
            raise RuntimeError("no data")

    with pytest.raises(RuntimeError) as failed:
        fail()
    assert not folder.exists()
    assert not hasattr(failed.value, "__notes__")


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str):
    with continued(tmp_path / "out", SEVEN):
        pass
    (tmp_path / "out" / PLAN).write_text(content)
    with pytest.raises(ResumeError, match=r"plan\.json is damaged"), continued(tmp_path / "out", SEVEN):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="holds other files"), continued(tmp_path, SEVEN):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
