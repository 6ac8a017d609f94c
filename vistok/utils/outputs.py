"""Output folders that take long to fill, and that a killed command can resume. Each has one writer, and a record of the
settings that its files depend on.

``collected`` is for folders that appear when they are complete: until then the files lie in ``TARGET.unfinished/``, and
``--resume`` continues. ``continued`` is for folders that the same command may extend at any time: they have their name
from the start. Files inside are written atomically, so a file that exists is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vistok.utils.files import (
    atomic_folder,
    check_absent,
    make_folder,
    read_json,
    remove_leftovers,
    remove_leftovers_of,
    write_json,
)
from vistok.utils.locks import holds_files, locked
from vistok.utils.processes import ALONE, Processes

SETTINGS = "unfinished.json"
"""The record in a collected folder until it is complete."""
PLAN = "plan.json"
"""The record in a continued folder, which stays."""


class ResumeError(ValueError):
    """There is nothing to resume, or it was made with other settings."""


@contextmanager
def collected(
    target: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    processes: Processes = ALONE,
    hopeless: type[Exception] | tuple[()] = (),
) -> Iterator[Path]:
    """Yield the folder in which the files of ``target`` are collected: a new one, or the one that a killed run left.

    When the block ends, the folder is renamed to ``target``. If the block raises, an empty folder is removed; otherwise
    the error gets a note on how to resume.

    Args:
        settings: everything that the files depend on, as JSON values.
        resume: continue the folder that a killed run left.
        processes: the processes that fill the folder together; each of them must enter this context.
        hopeless: the type of error that resuming would meet again.

    Raises:
        FileExistsError: ``target`` is not empty; or ``TARGET.unfinished`` exists and ``resume`` is False.
        ResumeError: there is nothing to resume, or it was made with other settings.
        FolderInUseError: another process fills the folder.
    """
    with _one_writer(target, processes):
        folder = unfinished(target)
        if processes.is_first:
            _begin(target, settings, resume=resume)
        processes.wait()
        try:
            yield folder
        except BaseException as error:
            if processes.count == 1 and not _is_begun(folder):
                shutil.rmtree(folder)
            elif isinstance(error, hopeless):
                error.add_note(f"Repaired images are other data: remove {folder} and begin anew.")
            else:
                error.add_note(f"What is finished lies in {folder}: once the cause is removed, go on with --resume.")
            raise
        if processes.is_first:
            _publish(target)
        processes.wait()


@contextmanager
def continued(folder: Path, settings: Mapping[str, Any], *, processes: Processes = ALONE) -> Iterator[Path]:
    """Yield ``folder``, which keeps a record of its settings, so that files of two settings never mix.

    A new folder is removed if the block raises before it has written a file.

    Args:
        settings: everything that all files depend on, as JSON values.
        processes: the processes that fill the folder together; each of them must enter this context.

    Raises:
        ResumeError: the folder was begun with other settings, its record is damaged, or it holds other files.
        FolderInUseError: another process fills the folder.
    """
    with _one_writer(folder, processes):
        if processes.is_first:
            if (folder / PLAN).exists():
                _check(folder, PLAN, settings)
            elif folder.is_dir() and holds_files(folder):
                raise ResumeError(f"{folder} holds other files; choose a new folder")
            else:
                make_folder(folder)
                write_json(folder / PLAN, settings)
        processes.wait()
        try:
            yield folder
        except BaseException as error:
            if _is_begun(folder, PLAN):
                error.add_note(f"What is finished lies in {folder}: the same command goes on from there.")
            elif processes.count == 1:
                shutil.rmtree(folder)
            raise


@contextmanager
def appearing(target: Path) -> Iterator[None]:
    """A block that makes ``target`` as a whole, by ``atomic_folder``, as its one writer. What killed ones left beside
    it is removed first.

    Raises:
        FileExistsError: ``target`` is there.
        FolderInUseError: another process makes it.
    """
    with locked(target):
        check_absent(target)
        remove_leftovers_of(target)
        yield


def unfinished(target: Path) -> Path:
    """The folder in which the files of ``target`` are collected, beside the folder that a link leads to."""
    target = target.resolve()
    return target.parent / f"{target.name}.unfinished"


def _one_writer(folder: Path, processes: Processes) -> Any:
    return locked(folder) if processes.is_first else nullcontext()


def _begin(target: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    if target.is_dir() and target.samefile("."):
        raise FileExistsError(f"{target} is the current folder, which cannot be replaced; name a new one inside it")
    if target.is_dir():
        (target / SETTINGS).unlink(missing_ok=True)  # left by a process that was killed after the rename
    if target.exists() and (not target.is_dir() or holds_files(target)):
        raise FileExistsError(f"{target} exists already and is not empty; choose another folder or remove it first")
    folder = unfinished(target)
    if resume:
        if not (folder / SETTINGS).is_file():
            raise ResumeError(f"nothing to resume: there is no {folder}; start without --resume")
        _check(folder, SETTINGS, settings)
        remove_leftovers(folder)
    elif folder.exists():
        raise FileExistsError(f"{folder} is of a run that did not finish; go on with --resume, or remove it first")
    else:
        with atomic_folder(folder) as temporary:
            write_json(temporary / SETTINGS, settings)


def _is_begun(folder: Path, record: str = SETTINGS) -> bool:
    """Whether a folder has any file beside its record."""
    return any(path.is_file() and path != folder / record for path in folder.rglob("*"))


def _check(folder: Path, record: str, settings: Mapping[str, Any]) -> None:
    """Raise ResumeError unless the record in a folder equals ``settings``."""
    try:
        saved = read_json(folder / record)
        wrong = [key for key in {**settings, **saved} if saved.get(key) != settings.get(key)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ResumeError(f"{folder / record} is damaged ({error}); remove {folder} and begin again") from error
    if wrong:
        raise ResumeError(
            f"{folder} was begun with another {', '.join(wrong)}: {wrong[0]} was {saved.get(wrong[0])!r} and is now "
            f"{settings.get(wrong[0])!r}. Go on with the same, remove the folder, or choose another one"
        )


def _publish(target: Path) -> None:
    """Rename the finished folder to ``target``."""
    target = target.resolve()
    if target.exists():
        target.rmdir()  # not every system can rename onto an empty folder
    unfinished(target).rename(target)
    (target / SETTINGS).unlink()
