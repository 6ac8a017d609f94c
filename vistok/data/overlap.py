"""Finds held-out samples that are also trained on, by their contents where possible."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast

import numpy as np

from vistok.data.clip_sources import SelectedClips
from vistok.data.decoding import DECODING_ERRORS
from vistok.data.loader import Source
from vistok.data.sources import DigitsSource, FileSource, Selection, TorchvisionSource
from vistok.data.tokens import TokenCache
from vistok.data.video_files import VideoSource
from vistok.utils.files import sha256

MOST_LOOKED_AT = 256
"""How many held-out samples are looked for, evenly spread: enough to find an overlap, and few enough to be fast."""
CHUNK = 16384
"""Cached samples that are compared at a time."""
TOLD_APART = 0.9
"""Equal tokens count as copies if more than this share of the held-out samples have distinct tokens."""
NAMED = (DigitsSource, TorchvisionSource)
"""Sources in which a name (data set, split and position) means the same image everywhere."""


class Shared(NamedTuple):
    """How many held-out samples are also trained on.

    Attributes:
        found: how many were found among the training samples.
        looked_at: how many were looked for.
        example: the name of one that was found, or None.
        told_apart: whether the compared values differ between most held-out samples, so that equal ones are copies.
    """

    found: int
    looked_at: int
    example: str | None = None
    told_apart: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether all samples that were looked for are trained on."""
        return self.found == self.looked_at and self.told_apart

    def __str__(self) -> str:
        text = f"{self.found} of {self.looked_at} held-out samples that were looked for are trained on: {self.example}"
        return text if self.told_apart else f"{text} (or look alike: held-out samples equal one another, too)"


def shared_images(trained: Source, held_out: Source) -> Shared:
    """Look for held-out images or videos among those that are trained on.

    Files are compared by their bytes. Other sources are compared by their fingerprints and, if both are known data sets
    (``NAMED``), by the names of their samples.
    """
    looked = _looked_at(len(held_out))
    if (files := _files(trained)) is not None and (others := _files(held_out)) is not None:
        found = _same_bytes(files, others, looked)  # fingerprints have only names and sizes, which may be equal
    elif trained.fingerprint() == held_out.fingerprint():
        found = looked
    elif isinstance(_whole(trained), NAMED) and isinstance(_whole(held_out), NAMED):
        names = {trained.name(index) for index in range(len(trained))}
        found = [index for index in looked if held_out.name(index) in names]
    else:
        found = []
    return Shared(len(found), len(looked), held_out.name(found[0]) if found else None)


def shared_tokens(trained: Sequence[TokenCache], held_out: TokenCache) -> Shared:
    """Look for held-out samples among those that are trained on, by their tokens in any view.

    Latents are compared up to rounding. One tokenizer must have made all caches.
    """
    looked = np.array(_looked_at(len(held_out)))
    rows = np.concatenate([_rows(held_out, looked, view) for view in range(held_out.views)])
    direction = np.random.default_rng(0).standard_normal(rows.shape[1])
    keys, found = rows @ direction, np.zeros(len(rows), dtype=bool)
    for cache in trained:
        for view in range(cache.views):
            for start in range(0, len(cache), CHUNK):
                others = _rows(cache, np.arange(start, min(start + CHUNK, len(cache))), view)
                found |= _are_among(rows, keys, others, others @ direction)
    among = found.reshape(held_out.views, len(looked)).max(0)
    example = f"{held_out.folder}[{looked[among][0]}]" if among.any() else None
    distinct = len(np.unique(rows[: len(looked)].round(3), axis=0))
    return Shared(int(among.sum()), len(looked), example, told_apart=distinct > TOLD_APART * len(looked))


def _rows(cache: TokenCache, indices: np.ndarray, view: int) -> np.ndarray:
    """(n, values of a sample) float64."""
    tokens, _ = cache.batch(indices, np.full(len(indices), view))
    return tokens.flatten(1).double().numpy()


def _are_among(rows: np.ndarray, keys: np.ndarray, others: np.ndarray, other_keys: np.ndarray) -> np.ndarray:
    """Which of ``rows`` (n, d) are among ``others`` (m, d), as (n,) bool.

    The keys (n,) and (m,) are projections onto one direction. Rows that are close have close keys, so only rows with
    close keys are compared.
    """
    order = np.argsort(other_keys)
    tolerance = 1e-3 + 1e-5 * np.abs(rows).sum(1)
    first = np.searchsorted(other_keys[order], keys - tolerance, side="left")
    last = np.searchsorted(other_keys[order], keys + tolerance, side="right")
    among = np.zeros(len(rows), dtype=bool)
    for number in np.flatnonzero(first < last):
        among[number] = np.isclose(rows[number], others[order[first[number] : last[number]]], atol=1e-3).all(1).any()
    return among


def _looked_at(count: int) -> list[int]:
    """The indices of at most ``MOST_LOOKED_AT`` of ``count`` samples, evenly spaced."""
    looked = min(count, MOST_LOOKED_AT)
    return [number * count // looked for number in range(looked)]


def _whole(source: Source) -> Source:
    return source.source if isinstance(source, Selection | SelectedClips) else source


class _Files(Protocol):
    """Files by index."""

    def size(self, index: int) -> int: ...

    def open(self, index: int) -> IO[bytes]: ...


class _VideoFiles:
    """Videos as files; a folder of frames counts as a file that holds the hashes of its frames, in their order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def size(self, index: int) -> int:
        path = self._paths[index]
        return sum(frame.stat().st_size for frame in path.iterdir()) if path.is_dir() else path.stat().st_size

    def open(self, index: int) -> IO[bytes]:
        path = self._paths[index]
        if not path.is_dir():
            return path.open("rb")
        return io.BytesIO("".join(sha256(frame) for frame in sorted(path.iterdir())).encode())


def _files(source: Source) -> tuple[_Files, Sequence[int]] | None:
    """The files of a source, and the indices of those that it uses; None if it does not read files."""
    whole = _whole(source)
    indices = source.indices if isinstance(source, Selection | SelectedClips) else range(len(source))
    if isinstance(whole, FileSource):
        return whole.files, indices
    if isinstance(whole, VideoSource) and all(path.exists() for path in whole.paths):
        return _VideoFiles(whole.paths), indices
    return None


def _same_bytes(
    trained: tuple[_Files, Sequence[int]], held_out: tuple[_Files, Sequence[int]], looked: Sequence[int]
) -> list[int]:
    """Which of the held-out files at ``looked`` have the same bytes as a training file.

    Only training files with the size of a held-out one are read.
    """
    (files, indices), (others, positions) = trained, held_out
    sizes = {index: others.size(positions[index]) for index in looked}
    wanted = set(sizes.values())
    candidates = [index for index in indices if files.size(index) in wanted]
    if not candidates:
        return []
    digests = {_digest(files, index) for index in candidates} - {None}
    return [index for index in looked if _digest(others, positions[index]) in digests]


def _digest(files: _Files, index: int) -> bytes | None:
    try:
        with files.open(index) as file:
            return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").digest()
    except DECODING_ERRORS:
        return None  # unreadable files are reported where they are loaded
