"""Uncompressed tar files, whose members can be read in place, and the samples in them.

The files of one sample share a key, which the extension follows. As in webdataset, the extension begins at the first
dot of the file's name, so that ``a.png``, ``a.seg.png`` and ``a.cls`` are one sample. A key may still have dots:
``v1.0.png`` is the image of a sample ``v1.0``, unless there is a sample ``v1`` with an image of its own. Without such
an image, ``a.left.png`` and ``a.right.png`` are two samples, which share the label and the texts of ``a`` where they
have none of their own.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vistok.data.files import is_hidden, member_name, printable
from vistok.data.formats import extension, image_extensions, without_extension
from vistok.data.imagefiles import LeftOut

UNCONDITIONAL = -1
LABELS = (".cls", ".json")
"""Extensions of files that may hold a sample's class id; the first one that holds it counts."""
LONGEST_LABEL = 1 << 20
MOST_CLASSES = 100_000
"""More classes than any data set of images has: a larger id is probably not a class id, and would make models huge."""


class Sample(NamedTuple):
    """The place of an image in a shard.

    Attributes:
        shard: number of the shard.
        offset, size: of the image's bytes in the shard.
        name: the sample's key with the image's extension.
        label: class id, or -1.
    """

    shard: int
    offset: int
    size: int
    name: str
    label: int


class Index(NamedTuple):
    """The samples of a shard.

    Attributes:
        samples: its images, in the order of the shard.
        left_out: files that belong to no sample with an image, or cannot be read.
        wrong_label: the message about the first label that is not a class id; None if there is none.
    """

    samples: list[Sample]
    left_out: LeftOut
    wrong_label: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of samples in shards: images or videos.

    Attributes:
        name: for messages.
        extensions: returns the extensions of its files, with the dot, in lower case.
    """

    name: str
    extensions: Callable[[], tuple[str, ...]]

    def wants(self, name: str) -> bool:
        """Whether a file with this name is of this kind."""
        return extension(name) in self.extensions()


IMAGES = Kind("image", image_extensions)


class Slice(io.RawIOBase):
    """A range of bytes of a file, as a file that is only read."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = path.open("rb"), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        content = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_member(path: Path, offset: int, size: int) -> BinaryIO:
    """Open a member of a tar file; its bytes are read on demand."""
    return io.BufferedReader(Slice(path, offset, size))


class Contents(NamedTuple):
    """The contents of a tar file.

    Attributes:
        files: the members that are files, or links to files before them, by name, in the order of the tar file. The
            bytes of each begin at its ``offset_data``.
        twice: names that several members have; the last member counts.
        skipped: members that are neither a file nor a folder, with the reason.
    """

    files: dict[str, tarfile.TarInfo]
    twice: frozenset[str]
    skipped: list[str]


def contents(path: Path) -> Contents:
    """List the members of a tar file.

    Raises:
        tarfile.ReadError: the file is not an uncompressed tar file, is cut, or is damaged.
        OSError: the file cannot be opened or read.
    """
    files: dict[str, tarfile.TarInfo] = {}
    twice, skipped = set[str](), list[str]()
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name, target = member_name(member.name), member
            if member.islnk() or member.issym():  # tar stores the second name of a file as a link
                beside = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                target = files.get(beside if member.issym() else member_name(member.linkname), member)
            if member.isdir() or not name:
                continue
            if not target.isreg() or target.issparse():
                skipped.append(f"{name} ({_reason(target)})")
                continue
            if name in files:
                twice.add(name)
            files[name] = target
        _check_end(path, archive.offset)
    return Contents(files, frozenset(twice), skipped)


def _reason(member: tarfile.TarInfo) -> str:
    if member.islnk() or member.issym():
        return "a link to no file before it"
    return "stored with holes" if member.issparse() else "a pipe, a socket or a device"


def index_shard(path: Path, number: int, kind: Kind = IMAGES) -> Index:
    """The images of a tar file, or samples of another kind, with their labels.

    Raises:
        tarfile.ReadError, OSError: see ``contents``.
        ValueError: a key has two images.
    """
    members, twice, skipped = contents(path)
    hidden = [name for name in members if is_hidden(name)]  # such as ._a.png, which macOS puts beside a.png
    members = {name: member for name, member in members.items() if not is_hidden(name)}
    for name in members:
        if name in twice and kind.wants(name):
            raise ValueError(
                f"{path}: the key {printable(without_extension(name))!r} has two {kind.name}s of the name "
                f"{printable(name)}"
            )
    images = _chosen(members, kind)
    _check_keys(path, images, kind)
    keys = {key for image in images for key in keys_of(image)}
    wrong_label = None
    try:
        labels = _labels(path, members, keys, twice)
    except ValueError as error:  # kept for later: evaluation reads images without labels
        labels, wrong_label = {}, str(error)
    samples = [
        Sample(number, members[name].offset_data, members[name].size, name, _first(labels, keys_of(name)))
        for name in images
    ]
    left_out = [name for name in members if name not in images and not _is_read(name, keys)]
    left_out += [*skipped, *(f"{name} (hidden)" for name in hidden)]
    return Index(samples, LeftOut.of(f"{path}:{name}" for name in left_out), wrong_label)


def keys_of(image: str) -> tuple[str, ...]:
    """The keys of an image's label and texts, its own one first: ``a.left`` and ``a`` of ``a.left.png``."""
    return tuple(dict.fromkeys((without_extension(image), _webdataset_key(image))))


def _first(labels: Mapping[str, int], keys: Sequence[str]) -> int:
    return next((labels[key] for key in keys if key in labels), UNCONDITIONAL)


def _chosen(members: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """From the name of each image to its key."""
    candidates = [name for name in members if kind.wants(name)]
    plain = {name for name in candidates if "." not in without_extension(name).rpartition("/")[2]}
    keys = {without_extension(name) for name in plain}
    return {name: without_extension(name) for name in candidates if name in plain or _webdataset_key(name) not in keys}


def _webdataset_key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _is_read(name: str, keys: set[str]) -> bool:
    """Whether a file belongs to one of the samples with these keys; a class id counts only under a key itself."""
    folder, slash, file = name.rpartition("/")
    parts = file.split(".")
    if extension(name) == LABELS[0]:
        return without_extension(name) in keys
    return any(folder + slash + ".".join(parts[:count]) in keys for count in range(1, len(parts)))


def _check_keys(path: Path, images: Mapping[str, str], kind: Kind) -> None:
    names: dict[str, str] = {}
    for name, key in images.items():
        other = names.setdefault(key, name)
        if other != name:
            raise ValueError(
                f"{path}: the key {printable(key)!r} has two {kind.name}s, {printable(other)} and {printable(name)}; "
                "keys must differ"
            )


def _labels(
    path: Path, members: Mapping[str, tarfile.TarInfo], keys: set[str], twice: Collection[str]
) -> dict[str, int]:
    """Class ids by key, from the .cls file, else from the .json file; keys without one are left out."""
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for kind in LABELS:
            for name, member in members.items():
                key = without_extension(name)
                if extension(name) != kind or key in labels or key not in keys:
                    continue
                if name in twice:
                    raise ValueError(f"{path} has two files {printable(name)}, which may differ; remove one")
                file.seek(member.offset_data)
                try:
                    label = _label(file.read(min(member.size, LONGEST_LABEL + 1)), kind)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{printable(name)} holds no class id: {error}") from error
                if label is not None:
                    labels[key] = label
    return labels


def _label(content: bytes, kind: str) -> int | None:
    """The class id in a file; None if it is a .json file whose "label" is absent or null.

    Raises:
        ValueError: the label is not an integer from 0, or -1 for no class.
    """
    if len(content) > LONGEST_LABEL:
        raise ValueError(f"the file has more than {LONGEST_LABEL:,} bytes")
    label: Any = content
    if kind == ".json":
        value = json.loads(content)
        label = value.get("label") if isinstance(value, dict) else None
    if label is None:
        return None
    if isinstance(label, str | bytes):  # int() would also accept 1_000 and digits of other scripts
        text = label.decode("utf-8", "backslashreplace") if isinstance(label, bytes) else label
        label = int(text) if re.fullmatch(r"\s*-?[0-9]+\s*", text) else text
    if not isinstance(label, int) or isinstance(label, bool) or label < UNCONDITIONAL:
        raise ValueError(
            f"expected an integer from 0, got {repr(label)[:100]}; number the classes from 0 (their names may be the "
            "lines of classnames.txt beside the shards)"
        )
    check_class(label)
    return label


def check_class(label: int) -> None:
    """Raise ValueError if a class id is not below ``MOST_CLASSES``."""
    if label >= MOST_CLASSES:
        raise ValueError(
            f"{label} would be one of more than {MOST_CLASSES:,} classes (ids count from 0); is it an id of something "
            "else? Number the classes from 0"
        )


def _check_end(path: Path, end: int) -> None:
    """Raise ReadError unless an archive that tarfile read up to ``end`` holds only zeros from there on.

    tarfile takes a cut file or a damaged header for the end of the archive.
    """
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")
        while block:
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"the header at byte {end} is damaged, or that is its end, and more follows")
            block = file.read(1 << 20)
