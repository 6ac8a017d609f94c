"""Folders that several processes fill, and that a killed run can go on filling.

Until all is there the files lie in ``TARGET.unfinished/``, beside a record of the settings that they depend on; then
the folder gets its name. Files inside are written atomically, so that one that exists is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistok.utils.files import atomic_folder, read_object, remove_leftovers, write_json
from vistok.utils.locks import holds_files

SETTINGS = "unfinished.json"


class ResumeError(ValueError):
    """There is nothing to resume, or what is there was begun with other settings."""


def unfinished(target: Path) -> Path:
    """Where the files of ``target`` are collected."""
    return target.with_name(f"{target.name}.unfinished")


def open_unfinished(target: Path, settings: Mapping[str, Any], *, resume: bool) -> Path:
    """The folder that collects the files of ``target``: a new one, or the one that a killed run left.

    Args:
        settings: everything that the files depend on, as JSON values.

    Raises:
        FileExistsError: ``target`` is there and not an empty folder; or an unfinished one is, and ``resume`` is False.
        ResumeError: nothing to resume, or something else.
    """
    (target / SETTINGS).unlink(missing_ok=True)  # left by a process that was killed when all was there
    if target.exists() and (not target.is_dir() or holds_files(target)):
        raise FileExistsError(f"{target} exists already and is not empty; choose another folder or remove it first")
    folder = unfinished(target)
    if resume:
        _check_settings(folder, settings)
        remove_leftovers(folder)
    elif folder.exists():
        raise FileExistsError(f"{folder} is of a run that did not finish; go on with --resume, or remove it first")
    else:
        with atomic_folder(folder) as temporary:
            write_json(temporary / SETTINGS, settings)
    return folder


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    if not (folder / SETTINGS).is_file():
        raise ResumeError(f"nothing to resume: there is no {folder}; start without --resume")
    try:
        saved = read_object(folder / SETTINGS)
    except ValueError as error:
        raise ResumeError(f"{error}; remove {folder} and begin again") from error
    wrong = [key for key, value in settings.items() if saved.get(key) != value]
    if wrong:
        raise ResumeError(
            f"{folder} was begun with another {', '.join(wrong)}: {wrong[0]} was {saved.get(wrong[0])!r} and is now "
            f"{settings[wrong[0]]!r}. Resume with the same, or remove the folder"
        )


def how_to_go_on(target: Path) -> str:
    """What an error says, as a note, that leaves an unfinished folder."""
    return f"What is finished lies in {unfinished(target)}: once the cause is removed, go on with --resume."


def discard(target: Path) -> None:
    """Remove what was collected."""
    shutil.rmtree(unfinished(target))


def publish(target: Path) -> None:
    """Give the finished folder its name."""
    if target.exists():
        target.rmdir()  # an empty folder, which not every system replaces
    unfinished(target).rename(target)
    (target / SETTINGS).unlink()
