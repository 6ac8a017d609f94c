"""Files in a folder or a zip archive, behind one interface: relative paths with forward slashes."""

from __future__ import annotations

import io
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = ("train", "val", "validation", "test")


class FileTree(ABC):
    """The files below ``root``, hidden ones excepted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths = [path for path in self._list() if not _is_hidden(path)]

    def images(self) -> list[str]:
        return [path for path in self._paths if path.lower().endswith(IMAGE_EXTENSIONS)]

    def others(self) -> list[str]:
        """Files that are not images, judged by their extension."""
        return [path for path in self._paths if not path.lower().endswith(IMAGE_EXTENSIONS)]

    @abstractmethod
    def _list(self) -> Sequence[str]: ...

    @abstractmethod
    def open(self, path: str) -> BinaryIO: ...

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the file, as stored uncompressed."""


class Folder(FileTree):
    def _list(self) -> Sequence[str]:
        paths = []
        for folder, _, names in os.walk(self.root, followlinks=True):
            relative = Path(folder).relative_to(self.root)
            paths += [(relative / name).as_posix() for name in names]
        return paths

    def open(self, path: str) -> BinaryIO:
        return open(self.root / path, "rb")

    def size(self, path: str) -> int:
        return os.stat(self.root / path).st_size


class Archive(FileTree):
    """A zip file; a single folder around all images is left out of the paths."""

    def __init__(self, root: Path) -> None:
        self._zip, self._owner = zipfile.ZipFile(root), os.getpid()
        self._wrapper = ""
        super().__init__(root)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}

    def _list(self) -> Sequence[str]:
        paths = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        self._wrapper = _wrapper([path for path in paths if not _is_hidden(path)])
        return [path.removeprefix(self._wrapper) for path in paths if path.startswith(self._wrapper)]

    def open(self, path: str) -> BinaryIO:
        try:
            return io.BytesIO(self._handle().read(self._wrapper + path))
        except (zipfile.BadZipFile, zipfile.zlib.error) as error:
            raise OSError(str(error)) from error

    def size(self, path: str) -> int:
        return self._handle().getinfo(self._wrapper + path).file_size

    def _handle(self) -> zipfile.ZipFile:
        # A handle inherited by a forked worker shares its file position with the parent, so each process opens one.
        if self._zip is None or self._owner != os.getpid():
            self._zip, self._owner = zipfile.ZipFile(self.root), os.getpid()
        return self._zip


def open_tree(root: str | Path) -> FileTree:
    """Open a folder or a .zip file.

    Raises:
        FileNotFoundError: there is nothing at ``root``.
        ValueError: ``root`` is a file, but no zip.
    """
    root = Path(root).expanduser()
    if root.is_dir():
        return Folder(root)
    if not root.exists():
        near = next(parent for parent in root.absolute().parents if parent.is_dir())
        raise FileNotFoundError(f"no such folder: {root} (the nearest that exists is {near})")
    if not zipfile.is_zipfile(root):
        raise ValueError(f"{root} is neither a folder nor a .zip file of images")
    return Archive(root)


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))


def _wrapper(paths: Sequence[str]) -> str:
    """The one folder around all images, unless it is a split."""
    tops = {path.partition("/")[0] for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)}
    top = tops.pop() if len(tops) == 1 else ""
    return f"{top}/" if top and top not in SPLITS and not top.lower().endswith(IMAGE_EXTENSIONS) else ""
