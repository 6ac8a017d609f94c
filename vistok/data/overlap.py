"""Held-out samples that are also trained on: found by what they are, not by what they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from vistok.data.decoding import DECODING_ERRORS
from vistok.data.sources import DigitsSource, FileSource, ImageSource, Selection, TorchvisionSource

MOST_LOOKED_AT = 256
"""Held-out samples that are looked for, evenly spread: enough to see that sets overlap, and few enough to wait for."""
NAMED = (DigitsSource, TorchvisionSource)
"""Sources in which a name (data set, split and position) means the same image everywhere."""


class Shared(NamedTuple):
    """How much two sets share.

    Attributes:
        found: held-out samples that are trained on.
        looked_at: those that were looked for.
        example: one that was found, or None.
    """

    found: int
    looked_at: int
    example: str | None = None

    def __str__(self) -> str:
        return f"{self.found} of {self.looked_at} held-out samples that were looked for are trained on: {self.example}"


def shared_images(trained: ImageSource, held_out: ImageSource) -> Shared:
    """Look for held-out images among those that are trained on: by their bytes, wherever they lie, where they are
    files; by their names, where these are of a known data set; else only by the fingerprints of the whole sets."""
    looked = _spread(len(held_out))
    if trained.fingerprint() == held_out.fingerprint():
        found = looked
    elif _files(trained) is not None and _files(held_out) is not None:
        found = _same_bytes(trained, held_out, looked)
    elif isinstance(_whole(trained), NAMED) and isinstance(_whole(held_out), NAMED):
        names = {trained.name(index) for index in range(len(trained))}
        found = [index for index in looked if held_out.name(index) in names]
    else:
        found = []
    return Shared(len(found), len(looked), held_out.name(found[0]) if found else None)


def _spread(count: int) -> list[int]:
    looked = min(count, MOST_LOOKED_AT)
    return [number * count // looked for number in range(looked)]


def _whole(source: ImageSource) -> ImageSource:
    return source.source if isinstance(source, Selection) else source


def _files(source: ImageSource) -> tuple[FileSource, Sequence[int]] | None:
    """The files of a source, and which of them it takes; None if it does not read files."""
    whole = _whole(source)
    if not isinstance(whole, FileSource):
        return None
    return whole, source.indices if isinstance(source, Selection) else range(len(source))


def _same_bytes(trained: ImageSource, held_out: ImageSource, looked: Sequence[int]) -> list[int]:
    """Which of the held-out images at ``looked`` have the bytes of one that is trained on.

    Only files of the same length are read.
    """
    ours, theirs = _files(trained), _files(held_out)
    if ours is None or theirs is None:
        return []
    (source, indices), (other, positions) = ours, theirs
    sizes = {index: other.files.size(positions[index]) for index in looked}
    wanted = set(sizes.values())
    candidates = [index for index in indices if source.files.size(index) in wanted]
    if not candidates:
        return []
    digests = {_digest(source, index) for index in candidates} - {None}
    return [index for index in looked if _digest(other, positions[index]) in digests]


def _digest(source: FileSource, index: int) -> bytes | None:
    try:
        with source.files.open(index) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except DECODING_ERRORS:
        return None  # it cannot be read, which is told elsewhere
