"""Files in a folder or a zip archive, behind one interface: relative paths with forward slashes."""

from __future__ import annotations

import io
import os
import re
import stat
import tokenize
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from vistok.data.formats import is_image

try:
    from lzma import LZMAError
except ImportError:  # a Python that was built without it, which reads no such entries
    LZMAError = EOFError  # type: ignore[misc, assignment]

CAPTIONS = "captions.jsonl"
"""What lies beside images and describes them; see :mod:`vistok.data.captions`."""
SPLITS = ("train", "val", "validation", "test")
SAMPLES = ("samples.json", "grid.png", "samples.npz", "unfinished.json")
"""What `vistok sample` puts beside samples: the first says that the others are there, and are not samples."""
UNPACKING_ERRORS = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError)
"""What reading a damaged entry of an archive raises, besides OSError."""
NPY_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    MemoryError,
    tokenize.TokenError,
    *UNPACKING_ERRORS,
)
"""What NumPy raises of a damaged .npy or .npz file, whose headers it parses like Python."""
SIGNATURES = {
    "zip": (0, b"PK\x03\x04", "a .zip file, which training reads with data.source=folder"),
    "tar": (257, b"ustar", "a .tar file, which training reads with data.source=webdataset"),
    "gzip": (0, b"\x1f\x8b", "compressed by gzip; unpack it (tar -xf, or gunzip)"),
    "bzip2": (0, b"BZh", "compressed by bzip2; unpack it (tar -xf, or bunzip2)"),
    "xz": (0, b"\xfd7zXZ\0", "compressed by xz; unpack it (tar -xf, or unxz)"),
    "zstd": (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it (tar -xf, or unzstd)"),
    "7z": (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    "rar": (0, b"Rar!", "a RAR archive; unpack it"),
    "html": (0, b"<", "a web page, as a failed download leaves it; fetch it again"),
}
"""Where files of which format have which bytes, and what to say of a file that should have another format."""
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control signs, surrogates and ends of lines."""
UTF8_NAME = 0x800
"""The flag of a zip entry whose name is UTF-8."""
HELD_IN_MEMORY = 64 << 20
"""Bytes of an archive's member that are unpacked at once; a larger one is unpacked while it is read."""


class FileTree(ABC):
    """The files below ``root``, hidden ones and those that `vistok sample` adds to samples excepted.

    Attributes:
        skipped: what was not looked into, with the reason: links that lead back or nowhere, files that are no data
            (a pipe would wait for a writer), entries of an archive with the name of another one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: list[str] = []
        paths = [path for path in self._list() if not is_hidden(path)]
        samples = {path.removesuffix(SAMPLES[0]) for path in paths if path.rpartition("/")[2] == SAMPLES[0]}
        own = {folder + name for folder in samples for name in SAMPLES}
        self._paths = [path for path in paths if path not in own]

    def images(self) -> list[str]:
        """The paths of all images, sorted."""
        return sorted(path for path in self._paths if is_image(path))

    def others(self) -> list[str]:
        """Files that are not images, judged by their extension."""
        return sorted(path for path in self._paths if not is_image(path))

    def as_root(self, folder: str) -> str:
        """What to take as root in place of this one, for the files below ``folder``."""
        return f"{self.root}/{folder}"

    @abstractmethod
    def _list(self) -> Sequence[str]: ...

    @abstractmethod
    def open(self, path: str) -> IO[bytes]:
        """Open a file, for seeking and reading. Raises OSError, of an archive's member for any damage."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the file, as stored uncompressed."""


class Folder(FileTree):
    """A folder on disk. Links to folders are followed, unless they lead back to a folder that they lie in."""

    def _list(self) -> Sequence[str]:
        return list(self._walk("", ()))

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        status = os.stat(self.root / folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            self.skipped.append(f"{folder.rstrip('/')} (a link that leads back)")
            return
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    yield from self._walk(f"{folder}{entry.name}/", (*above, here))
                elif entry.is_file():
                    yield folder + entry.name
                elif not is_hidden(folder + entry.name):
                    reason = "a pipe, a socket or a device" if os.path.exists(entry.path) else "a link to nothing"
                    self.skipped.append(f"{folder}{entry.name} ({reason})")

    def open(self, path: str) -> IO[bytes]:
        return open(self.root / path, "rb")

    def size(self, path: str) -> int:
        return os.stat(self.root / path).st_size


class Archive(FileTree):
    """A zip file; a single folder around all images is left out of the paths, unless captions lie beside it.

    Raises:
        ValueError: its table of contents is damaged.
    """

    def __init__(self, root: Path) -> None:
        try:
            self._zip, self._owner = zipfile.ZipFile(root), os.getpid()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise ValueError(f"{root} is a damaged .zip file ({error}); fetch or make it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        skipped = []
        for info in self._zip.infolist():
            name, is_folder = member_name(_stored_name(info)), info.filename.endswith(("/", "\\"))
            if stat.S_ISLNK(info.external_attr >> 16):
                skipped.append(f"{name} (a link; zip without -y stores what it leads to)")
            elif name and not is_folder:
                if name in self._members:
                    skipped.append(f"{name} (an earlier entry of that name)")
                self._members[name] = info
        self._wrapper = ""
        super().__init__(root)
        self.skipped += [name.removeprefix(self._wrapper) for name in skipped if not is_hidden(name)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}

    def _list(self) -> Sequence[str]:
        paths = [path for path in self._members if not is_hidden(path)]
        self._wrapper = "" if CAPTIONS in paths else _wrapper(paths)
        beside = [path for path in paths if not path.startswith(self._wrapper)]
        self.skipped += [f"{path} (beside {self._wrapper})" for path in beside]
        return [path.removeprefix(self._wrapper) for path in paths if path.startswith(self._wrapper)]

    def as_root(self, folder: str) -> str:
        return f"the unpacked {folder}"

    def open(self, path: str) -> IO[bytes]:
        info = self._members[self._wrapper + path]
        try:
            if info.file_size > HELD_IN_MEMORY:
                return self._handle().open(info)
            return io.BytesIO(self._handle().read(info))
        except (*UNPACKING_ERRORS, ValueError) as error:
            raise OSError(f"the archive's entry is damaged: {error}") from error
        except NotImplementedError as error:
            raise OSError(f"it is packed by method {info.compress_type}, which cannot be unpacked here") from error
        except RuntimeError as error:  # zipfile's word for a password that is missing
            raise OSError(f"the archive's entry is encrypted: {error}") from error

    def size(self, path: str) -> int:
        return self._members[self._wrapper + path].file_size

    def _handle(self) -> zipfile.ZipFile:
        # A handle inherited by a forked worker shares its file position with the parent, so each process opens one.
        if self._zip is None or self._owner != os.getpid():
            self._zip, self._owner = zipfile.ZipFile(self.root), os.getpid()
        return self._zip


def open_tree(root: str | Path) -> FileTree:
    """Open a folder or a .zip file.

    Raises:
        FileNotFoundError: there is nothing at ``root``.
        ValueError: ``root`` is a file, but no zip, or a damaged one.
    """
    root = Path(root).expanduser()
    if root.is_dir():
        return Folder(root)
    if not root.exists():
        near = next(parent for parent in root.absolute().parents if parent.is_dir())
        raise FileNotFoundError(f"no such folder: {root} (the nearest that exists is {near})")
    if not zipfile.is_zipfile(root) and format_of(root) == "zip":
        raise ValueError(
            f"{root} is a damaged .zip file: the table of contents at its end is missing, so it is cut, or a part of "
            "several; fetch or make it again"
        )
    if not zipfile.is_zipfile(root):
        raise ValueError(f"{root} is neither a folder nor a .zip file of images{other_format(root)}")
    return Archive(root)


def format_of(path: Path) -> str:
    """The entry of ``SIGNATURES`` whose bytes a file has; "" if none."""
    with path.open("rb") as file:
        start = file.read(512)
    return next((name for name, (at, sign, _) in SIGNATURES.items() if start[at:].startswith(sign)), "")


def other_format(path: Path, expected: str = "") -> str:
    """What to say of a file that cannot be read: what it is, and what to do; "" if that is not known, or expected."""
    name = format_of(path)
    return f"; it is {SIGNATURES[name][2]}" if name and name != expected else ""


def member_name(name: str) -> str:
    """The path below a folder to which an archive's member would be unpacked: without drive, root, ``.`` and ``..``, as
    unpackers do it; ``\\`` separates folders, too (archives made on Windows)."""
    parts = re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _stored_name(info: zipfile.ZipInfo) -> str:
    """The name of an entry, where zipfile cuts it at a NUL, and takes UTF-8 without the flag that says so (as macOS
    writes it) for code page 437."""
    name = info.orig_filename if "\0" in info.orig_filename else info.filename
    if info.flag_bits & UTF8_NAME or name.isascii():
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def printable(text: str) -> str:
    """A file's name as it can be printed and saved: bytes that are no UTF-8 become ``\\xff``, and so do signs that a
    terminal would obey."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if _escapes(text) else text
    return "".join(sign if unicodedata.category(sign) not in UNPRINTABLE else _escaped(sign) for sign in text)


def _escapes(text: str) -> bool:
    """Whether it can be written as UTF-8 but for bytes of other encodings."""
    return all(not "\ud800" <= sign <= "\udfff" or "\udc80" <= sign <= "\udcff" for sign in text)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder above it, is one of those that systems keep for themselves."""
    return any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in path.split("/"))


def _wrapper(paths: Sequence[str]) -> str:
    """The one folder around all images, unless it is a split."""
    tops = {path.partition("/")[0] for path in paths if is_image(path)}
    top = tops.pop() if len(tops) == 1 else ""
    return f"{top}/" if top and top not in SPLITS and not is_image(top) else ""
