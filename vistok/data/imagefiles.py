"""Image files of a folder, an archive or shards, for training and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Set
from typing import IO, NamedTuple

from vistok.data.files import CAPTIONS, FileTree, printable
from vistok.data.formats import TEXT, extension, without_extension

SHOWN = 5
"""How many names a message about several files gives."""


class LeftOut(NamedTuple):
    """Files that are not read.

    Attributes:
        count: how many.
        names: the first few.
    """

    count: int = 0  # type: ignore[assignment]  # hides tuple.count, which is not used here
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> LeftOut:
        names = list(names)
        return cls(len(names), tuple(map(printable, names[:SHOWN])))

    def __add__(self, other: LeftOut) -> LeftOut:  # type: ignore[override]  # the sum of two, not a longer tuple
        return LeftOut(self.count + other.count, (self.names + other.names)[:SHOWN])

    def __str__(self) -> str:
        shown = ", ".join(self.names) + (", …" if self.count > len(self.names) else "")
        what = "1 other file is" if self.count == 1 else f"{self.count} other files are"
        return f"{what} ignored: {shown}"


class ImageFiles(ABC):
    """Files that are read as images, by index.

    Attributes:
        source: where the files lie, for messages and reports.
        left_out: files beside them that are not read.
    """

    source: str
    left_out: LeftOut = LeftOut()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, index: int) -> str:
        """The path of a file below the source, with its extension."""

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """Open a file for reading; it can seek. Raises OSError if it cannot be read."""

    @abstractmethod
    def size(self, index: int) -> int:
        """The length of the file in bytes."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of a file in messages."""


def _is_caption(path: str, images: Set[str]) -> bool:
    """Whether a file holds captions of ``images``, which are paths without their extensions."""
    return path.rpartition("/")[2] == CAPTIONS or (extension(path) == TEXT and without_extension(path) in images)


class TreeFiles(ImageFiles):
    """Images of a folder or zip archive.

    Args:
        tree: the folder or archive.
        prefix: a folder with its slash; only the images below it are read.
    """

    def __init__(self, tree: FileTree, prefix: str = "") -> None:
        self._tree = tree
        self.source = printable(str(tree.root))
        self.paths: Sequence[str] = [path for path in tree.images() if path.startswith(prefix)]
        others = [path for path in [*tree.others(), *tree.skipped] if path.startswith(prefix)]
        has_texts = any(extension(path) == TEXT for path in others)  # else there is no need to look at all images
        images = set(map(without_extension, self.paths)) if has_texts else set()
        self.left_out = LeftOut.of(path for path in others if not _is_caption(path, images))

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> IO[bytes]:
        return self._tree.open(self.paths[index])

    def size(self, index: int) -> int:
        return self._tree.size(self.paths[index])

    def name(self, index: int) -> str:
        return printable(f"{self._tree.root}/{self.paths[index]}")
