"""Locks of folders: one process at a time writes a folder, and others learn which process that is."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vistok.utils.files import make_folder

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems without locks, such as a network share whose server runs no lock service."""
TRIES = 10
"""How often a lock is tried: its file may be removed by the last owner, or be left by a dead one."""
OWNER = {"pid": int, "host": str, "space": str, "started": float}
"""The fields of an owner file, and their types."""


class FolderInUseError(ValueError):
    """Another process is writing the folder."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which need not exist yet.

    The operating system frees the lock of a process that dies. The lock file is ``.NAME.lock`` beside the folder, or
    inside it if the parent is not writable; ``.NAME.owner`` tells who holds the lock.

    Raises:
        FolderInUseError: a running process holds the lock.
    """
    from filelock import FileLock

    folder = Path(folder).resolve()
    path = _lock_file(folder)
    lock = _acquire(FileLock, path, folder)
    owner, holder = path.with_suffix(".owner"), os.getpid()
    try:
        if lock is not None:
            owner.write_text(json.dumps(_this_process()))
        yield
    finally:
        if lock is not None and os.getpid() == holder:  # a process forked inside the block holds no lock
            owner.unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # before the release: whoever has opened the file by then tries again
            lock.release()


def holds_files(folder: Path) -> bool:
    """Whether a folder holds anything other than its own lock files."""
    own = (f".{folder.resolve().name}.lock", f".{folder.resolve().name}.owner")
    return any(path.name not in own for path in folder.iterdir())


def _lock_file(folder: Path) -> Path:
    make_folder(folder.parent)
    beside = os.access(folder.parent, os.W_OK) or not folder.is_dir()
    return (folder.parent if beside else folder) / f".{folder.name}.lock"


def _acquire(kind: type, path: Path, folder: Path) -> Any:
    """The acquired lock; None if the file system has no locks."""
    from filelock import Timeout

    for _ in range(TRIES):
        lock = kind(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = _owner(path)
            if owner is None and not path.exists():
                path.touch()  # FileLock waits where it cannot make its file; this raises the reason
                continue
            if owner is None or not _is_dead(owner):
                raise FolderInUseError(_in_use(folder, owner)) from None
            path.unlink(missing_ok=True)  # held by children that the dead owner left behind, such as data loaders
            continue
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            log.warning("the file system of %s has no locks: take care that no other process writes it", folder)
            return None
        if _still_stands(kind, path):
            return lock
        lock.release()
    raise FolderInUseError(_in_use(folder, _owner(path)))


def _still_stands(kind: type, path: Path) -> bool:
    """Whether the lock file just acquired is still at ``path``; its last owner may have removed it."""
    from filelock import Timeout

    other = kind(path)
    try:
        other.acquire(timeout=0)
    except Timeout:
        return True
    other.release()
    return False


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "space": _space(), "started": _started(os.getpid())}


def _space() -> str:
    """An id of this boot and pid namespace. It tells apart machines or containers with one host name, in which the same
    pid is another process."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def _started(pid: int) -> float:
    """When a process started: on Linux in clock ticks since boot, since the wall clock may be changed; else in seconds.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    began = psutil.Process(pid).create_time()
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, LookupError, ValueError):
        return began


def _owner(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.with_suffix(".owner").read_text())
        return {kind: convert(owner[kind]) for kind, convert in OWNER.items()}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # it is being written, or damaged


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to be dead; always False for one on another host or in another container."""
    if (owner["host"], owner["space"]) != (socket.gethostname(), _space()):
        return False
    try:
        if psutil.Process(owner["pid"]).status() == psutil.STATUS_ZOMBIE:  # killed, but not reaped by its parent
            return True
        return abs(_started(owner["pid"]) - owner["started"]) > 1
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, ValueError, OverflowError):  # the last two: the pid is invalid
        return False


def _in_use(folder: Path, owner: dict[str, Any] | None) -> str:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return f"{folder} is in use: {who} is writing it. Wait for its end, or choose another folder"
