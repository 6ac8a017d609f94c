"""Files and folders: atomic writes, JSON and text, messages about missing paths, and the folder of caches."""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL, RETIRED, INNER = ".partial", ".old", "old"


@contextmanager
def atomic_folder(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that becomes ``target`` if the block succeeds, and vanishes if not.

    If the process is killed, ``target`` is the old folder or the new one. On a file system that cannot exchange two
    folders it may be missing until :func:`restore` puts the old one back.

    Raises:
        FileExistsError: ``replace`` is False and ``target`` exists, or another process makes it before the block ends.
    """
    target = Path(target)
    restore(target.parent)
    if not replace:
        check_absent(target)
    make_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes private folders
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if replace and target.exists():
            _swap(temporary, target)
        else:
            _rename(temporary, target)
        _flush(target.parent)
    except BaseException:
        restore(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_absent(target: Path) -> None:
    """Raise FileExistsError if there is something at ``target``, a folder to be made; also a link to nothing."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already; choose another folder or remove it first")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        NotADirectoryError: a file is in its place, or in that of a folder above it.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        nearest_folder(folder)
        raise error


def nearest_folder(folder: Path) -> Path:
    """``folder`` or the nearest folder above it that exists. Raises NotADirectoryError if a file is in its place."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if path.is_dir():
            return path
        if os.path.lexists(path):
            kind = "a file" if path.exists() else "a link that leads nowhere"
            raise NotADirectoryError(f"{path} is {kind}, so there can be no folder {folder}; name another")
    raise NotADirectoryError(f"there can be no folder {folder}")


def check_file_to_write(target: str | os.PathLike[str]) -> None:
    """Check that a file can be written at ``target``, before the work whose result it gets.

    Raises:
        IsADirectoryError, NotADirectoryError: ``target`` is a folder, or is below a file.
        ValueError: ``target`` is a device or pipe, which writing would replace.
        OSError: the folder is not writable.
    """
    path = Path(target)
    _check_no_other_kind(path)
    folder = nearest_folder(path.parent)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing can be written in {folder}, which is read-only; name another folder")


def _check_no_other_kind(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {path / 'result'}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe, which would be replaced; name a file")


def restore(parent: Path) -> None:
    """Put back the folders of ``parent`` that a process set aside before it was killed in the middle of a swap."""
    for retired in parent.glob(f".*{RETIRED}"):
        target = parent / retired.name[1 : -len(RETIRED)].rpartition(".")[0]
        if (retired / INNER).exists() and not target.exists():
            try:
                os.replace(retired / INNER, target)
            except OSError:
                if not target.exists():  # else another process has put it back
                    raise


def _rename(new: Path, target: Path) -> None:
    try:
        os.replace(new, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(f"{target} has been made by another process meanwhile; choose another folder") from error


def _swap(new: Path, target: Path) -> None:
    """Replace ``target`` by ``new``; the old ``target`` is deleted."""
    if _exchange(new, target):
        _remove(new)
        return
    while True:
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=RETIRED, dir=target.parent))
        os.replace(target, retired / INNER)
        try:
            os.replace(new, target)
        except OSError:
            if not target.exists():
                raise
            continue  # a reader has put the old one back
        shutil.rmtree(retired, ignore_errors=True)
        return


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically; returns False if the system or file system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # an old C library
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder that only this process writes. If the process is killed, the folder is there as a whole or not at
    all; ``remove_leftovers`` of its parent removes the rest."""
    retired = folder.with_name(f".{folder.name}{PARTIAL}")  # a rename works on a full disk, too
    _remove(retired)
    os.replace(folder, retired)
    _remove(retired)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders that a killed process left in ``folder``, and restore those it set aside.

    The caller must hold the folder's lock, because a running process has such files, too.
    """
    restore(folder)
    _remove_partial(folder, "*")


def remove_leftovers_of(target: Path) -> None:
    """Remove what killed processes left beside ``target`` when they made it, and put back what they had set aside. The
    caller must hold the lock of ``target``."""
    restore(target.parent)
    _remove_partial(target.parent, f"{glob.escape(target.name)}.{'?' * 8}")  # as tempfile draws names


def _remove_partial(folder: Path, name: str) -> None:
    for suffix in (PARTIAL, RETIRED):
        for path in list(folder.glob(f".{name}{suffix}")):
            _remove(path)


@contextmanager
def atomic_file(target: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; it replaces ``target`` if the block succeeds, and vanishes if not.

    Args:
        durable: whether the file also survives a loss of power, which takes milliseconds; False for thousands of files.

    Raises:
        OSError, ValueError: no file can be written there; see ``check_file_to_write``.
    """
    target = Path(target)
    _check_no_other_kind(target)
    make_folder(target.parent)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        if durable:
            _flush(temporary)
        os.replace(temporary, target)
        if durable:
            _flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Flush a file or folder to disk; otherwise a rename may reach the disk before the content does."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A UTF-8 path of a file, for libraries that take no other paths, such as safetensors.

    If a folder above the file has a name that is not UTF-8, as Linux allows, the path leads through the descriptor of
    the opened folder, and is valid inside the context only.

    Raises:
        ValueError: the file's own name is not UTF-8.
    """
    name = os.fspath(path)
    if is_utf8(name):
        yield name
        return
    folder, own = os.path.split(name)
    if not is_utf8(own):
        raise ValueError(f"the name of the file {own!r} is not UTF-8; rename it")
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}/{own}"
    finally:
        os.close(handle)


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; file names in other encodings cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_json(target: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ValueError for NaN, which is not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold JSON: {error}") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises as ``read_json``, also for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object, but a {type(value).__name__}")
    return value


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(missing_file(path))
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        ) from error


def missing_file(path: str | Path) -> str:
    """The message about a missing file: its path, and the most similar files near it."""
    path = Path(path)
    if path.is_dir():
        return f"{path} is a folder; name a file"
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path.cwd())
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3) or names[:5]
    return f"there is no file {path}" + (f"; {folder} has {', '.join(near)}" if near else "")


def missing_folder(path: str | Path) -> str:
    """The message about a missing folder: its path, and the most similar folders beside it."""
    path = Path(path)
    if path.exists():
        return f"{path} is a file; name a folder"
    return f"there is no folder {path}{beside(path)}"


def beside(path: str | Path) -> str:
    """The end of a message about a missing folder, such as "; runs has first, second", the most similar first.

    Empty if ``path`` names no parent folder, or one that does not exist.
    """
    path = Path(path)
    if path.parent == Path() or not path.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3) or names[:5]
    return f"; {path.parent} has {', '.join(near)}" if near else ""


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(name: str) -> Path:
    """The folder of a cache: ``~/.cache/vistok/NAME``, or below ``$XDG_CACHE_HOME``. It may not exist yet.

    Raises:
        RuntimeError: the home folder is unknown.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vistok" / name
