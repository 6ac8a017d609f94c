"""Webdataset shards (tar files) as sets of images, read with the standard library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from vistok.data.tar import regular_files
from vistok.eval.decoding import EXTENSIONS, LOSSY_EXTENSIONS, ImageError, common_size, decode, size_of


def shards_in(folder: Path) -> list[Path]:
    """The .tar files of a folder that holds them and no images beside them; empty if it is no such folder."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(path.suffix.lower() in EXTENSIONS for path in files):
        return []
    return [path for path in files if path.suffix == ".tar"]


class _Member(NamedTuple):
    """An image in a shard: where its bytes lie (uncompressed tars are files one after another)."""

    key: str
    shard: Path
    offset: int
    length: int
    extension: str

    def read(self) -> io.BytesIO:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}{self.extension}"


class TarImages:
    """The images of webdataset shards in the order of their keys, whatever the order in the files.

    A key is a member's name up to the first dot of its last part; other members of a sample (labels, captions) are
    passed over. So shards written by several processes give the order of the folder that they were made of.

    Args:
        files: the shards.
        crop: side to which ADM's centre crop brings every image; None takes images of one size as they are.

    Raises:
        ImageError: a shard that cannot be read, no images, two images with one key, or mixed sizes.
    """

    def __init__(self, files: Sequence[Path], *, crop: int | None = None):
        self.source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
        self._members = sorted(member for file in files for member in _members(file))
        if not self._members:
            raise ImageError(f"no images in {self.source}; expected members named KEY{{{','.join(EXTENSIONS)}}}")
        for one, other in zip(self._members, self._members[1:]):
            if one.key == other.key:
                raise ImageError(f"the key {one.key!r} has two images, {one} and {other}; keys must differ")
        self.names = [member.key for member in self._members]
        self.count = len(self._members)
        self.lossy = sum(member.extension in LOSSY_EXTENSIONS for member in self._members)
        self._crop = crop
        sizes = ((str(member), size_of(member.read(), str(member))) for member in self._members)
        self.size = common_size(sizes) if crop is None else (crop, crop)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        members = self._members[start:stop]
        with ThreadPoolExecutor(max_workers=4) as pool:  # decoding releases the interpreter lock
            for first in range(0, len(members), batch_size):
                yield torch.stack(list(pool.map(self._decode, members[first : first + batch_size])))

    def _decode(self, member: _Member) -> Tensor:
        return decode(member.read(), str(member), self._crop)


def _members(file: Path) -> list[_Member]:
    try:
        infos = regular_files(file)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{file} is not a readable .tar shard (compressed ones are not supported): {error}") from error
    members = []
    for info in infos:
        path = PurePosixPath(info.name.removeprefix("./"))
        stem, dot, extension = path.name.partition(".")
        if f".{extension.lower()}" in EXTENSIONS and dot and stem:
            key = path.with_name(stem).as_posix()
            members.append(_Member(key, file, info.offset_data, info.size, f".{extension.lower()}"))
    return members
