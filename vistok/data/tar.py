"""Uncompressed tar files, which hold their files one after another as they are."""

from __future__ import annotations

import tarfile
from pathlib import Path


def regular_files(path: Path) -> list[tarfile.TarInfo]:
    """The members of a tar file that are files, in their order there; the bytes of each begin at its ``offset_data``.

    Raises:
        tarfile.ReadError: it is no uncompressed tar file, cut, or damaged.
        OSError: it cannot be read at all.
    """
    with tarfile.open(path, "r:") as archive:
        members = [member for member in archive if member.isfile()]
        _check_end(path, archive.offset)
    return members


def _check_end(path: Path, end: int) -> None:
    """Raise ReadError unless an archive that tarfile read up to ``end`` ends there, with zeros and nothing else.

    tarfile takes a cut file, and a damaged header, for the end.
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
