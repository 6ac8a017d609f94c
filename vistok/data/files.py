"""Files in a folder or a zip archive, behind one interface: relative paths with forward slashes."""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import struct
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
except ImportError:  # Python was built without lzma; zipfile then cannot read such entries
    LZMAError = EOFError  # type: ignore[misc, assignment]

log = logging.getLogger(__name__)

CAPTIONS = "captions.jsonl"
"""The file of captions beside images; see :mod:`vistok.data.captions`."""
SPLITS = ("train", "val", "validation", "test")
SAMPLES = ("samples.json", "grid.png", "samples.npz", "unfinished.json")
"""Files that `vistok sample` writes beside samples. In a folder with the first one, all of them are left out."""
SYSTEM_FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
"""Folders that Windows and network drives add, with thumbnails or deleted files in them."""
UNPACKING_ERRORS = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError)
"""The errors, besides OSError, of reading a damaged entry of an archive."""
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
"""The errors of reading a damaged .npy or .npz file, whose headers NumPy parses as Python code."""
SIGNATURES = {
    "zip": (0, b"PK\x03\x04", "a .zip file, which training reads with data.source=folder"),
    "tar": (257, b"ustar", "a .tar file, which training reads with data.source=webdataset"),
    "gzip": (0, b"\x1f\x8b", "compressed by gzip; unpack it (tar -xf, or gunzip)"),
    "bzip2": (0, b"BZh", "compressed by bzip2; unpack it (tar -xf, or bunzip2)"),
    "xz": (0, b"\xfd7zXZ\0", "compressed by xz; unpack it (tar -xf, or unxz)"),
    "zstd": (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it (tar -xf, or unzstd)"),
    "7z": (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    "roshal": (0, b"Rar!", "a RAR archive; unpack it"),
    "html": (0, b"<", "a web page, as a failed download leaves it; fetch it again"),
}
"""Where files of which format have which bytes, and what to say of a file that should have another format."""
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, surrogates and line ends."""
UTF8_NAME = 0x800
"""The flag of a zip entry whose name is UTF-8."""
UNICODE_PATH = 0x7075
"""The extra field of a zip entry in which Info-ZIP repeats the name in UTF-8, behind a version (1) and the CRC-32 of
the name's bytes."""
HELD_IN_MEMORY = 64 << 20
"""Members of an archive of at most this many bytes are unpacked at once; larger ones are unpacked while they are
read."""


class FileTree(ABC):
    """The files below ``root``, without hidden files and those that `vistok sample` adds to samples.

    Attributes:
        skipped: paths that are not read, with the reason: links that lead back or nowhere, special files (reading a
            pipe would wait for a writer), entries of an archive that a later entry of the same name replaces, and
            those beside the one folder of an archive that holds all images.
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
        """Open a file for reading; it can seek. Raises OSError, also if a member of an archive is damaged."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Size of the file in bytes, uncompressed."""


class Folder(FileTree):
    """A folder on disk. Links to folders are followed, unless they lead to a folder above the link."""

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
                if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                    yield from self._walk(f"{folder}{entry.name}/", (*above, here))
                elif os.path.isfile(entry) if entry.is_symlink() else entry.is_file():
                    yield folder + entry.name
                elif not is_hidden(folder + entry.name):
                    reason = "a pipe, a socket or a device" if os.path.exists(entry.path) else "a link to nothing"
                    self.skipped.append(f"{folder}{entry.name} ({reason})")

    def open(self, path: str) -> IO[bytes]:
        return open(self.root / path, "rb")

    def size(self, path: str) -> int:
        return os.stat(self.root / path).st_size


class Archive(FileTree):
    """A zip file. If a single folder holds all images, the paths begin below it.

    Raises:
        ValueError: the table of contents is damaged.
    """

    def __init__(self, root: Path) -> None:
        try:
            self._zip, self._owner = zipfile.ZipFile(root), os.getpid()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise ValueError(f"{root} is a damaged .zip file ({error}); fetch or make it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        skipped, unsure = [], []
        for info in self._zip.infolist():
            stored, is_known = _stored_name(info)
            name, is_folder = member_name(stored), info.filename.endswith(("/", "\\"))
            if stat.S_ISLNK(info.external_attr >> 16):
                skipped.append(f"{name} (a link; zip without -y stores what it leads to)")
            elif name and not is_folder:
                if name in self._members:
                    skipped.append(f"{name} (an earlier entry of that name)")
                self._members[name] = info
                unsure += [] if is_known or is_hidden(name) else [name]
        if unsure:
            log.warning(
                "%s: the names of %d entries, such as %s, are not in UTF-8 and are read as code page 437; if they look "
                "wrong, make the archive anew with names in UTF-8",
                root,
                len(unsure),
                printable(unsure[0]),
            )
        self._wrapper = ""
        super().__init__(root)
        self.skipped += [name.removeprefix(self._wrapper) for name in skipped if not is_hidden(name)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}

    def _list(self) -> Sequence[str]:
        paths = [path for path in self._members if not is_hidden(path)]
        self._wrapper = _wrapper(paths)
        within = [path for path in paths if path.startswith(self._wrapper)]
        self.skipped += sorted(set(paths) - set(within))
        return [path.removeprefix(self._wrapper) for path in within]

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
        except RuntimeError as error:  # zipfile raises it if a password is missing
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
        ValueError: ``root`` is a file, but not a zip file, or a damaged one.
    """
    root = Path(root).expanduser()
    if root.is_dir():
        return Folder(root)
    if not root.exists():
        near = next(parent for parent in root.absolute().parents if parent.is_dir())
        raise FileNotFoundError(f"no such folder: {root} (the nearest that exists is {near})")
    if zipfile.is_zipfile(root):
        return Archive(root)
    if format_of(root) == "zip":
        raise ValueError(
            f"{root} is a damaged .zip file: the table of contents at its end is missing, so it is cut, or a part of "
            "several; fetch or make it again"
        )
    raise ValueError(f"{root} is neither a folder nor a .zip file of images{other_format(root)}")


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


def _stored_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """The name of an entry, and whether its encoding is known: the archive says UTF-8, it is UTF-8 all the same (as
    macOS writes it), or Info-ZIP's extra field has it in UTF-8. Otherwise the name is read as code page 437.

    zipfile cuts names at a NUL.
    """
    name = info.orig_filename if "\0" in info.orig_filename else info.filename
    if info.flag_bits & UTF8_NAME or name.isascii():
        return name, True
    stored = info.orig_filename.encode("cp437", "replace")
    try:
        return (_unicode_path(info.extra, stored) or stored.decode("utf-8")), True
    except UnicodeError:
        return name, False


def _unicode_path(extra: bytes, stored: bytes) -> str | None:
    """The name in Info-ZIP's extra field "Unicode Path", unless the entry was renamed since that was written."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == UNICODE_PATH and content[:5] == b"\1" + zlib.crc32(stored).to_bytes(4, "little"):
            return content[5:].decode("utf-8")
    return None


def printable(text: str) -> str:
    """The name of a file in a form that can be printed and saved.

    Bytes that are not UTF-8, and control characters that a terminal would act on, become escapes such as ``\\xff``.
    """
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if _escapes(text) else text
    return "".join(sign if unicodedata.category(sign) not in UNPRINTABLE else _escaped(sign) for sign in text)


def _escapes(text: str) -> bool:
    """Whether all surrogates of the text stand for single bytes of another encoding (as in ``surrogateescape``)."""
    return all(not "\ud800" <= sign <= "\udfff" or "\udc80" <= sign <= "\udcff" for sign in text)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder above it, has a hidden name (``.x``) or one of ``SYSTEM_FOLDERS``."""
    return any(
        part in SYSTEM_FOLDERS or (part.startswith((".", "__MACOSX")) and part not in (".", ".."))
        for part in path.split("/")
    )


def _wrapper(paths: Sequence[str]) -> str:
    """The single top folder of all images, with its slash.

    "" if there are several, if it is a split, or if captions lie beside it, whose paths begin with its name.
    """
    if CAPTIONS in paths:
        return ""
    tops = {path.partition("/")[0] for path in paths if is_image(path)}
    top = tops.pop() if len(tops) == 1 else ""
    return f"{top}/" if top and top not in SPLITS and not is_image(top) else ""
