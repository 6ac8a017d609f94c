"""The token caches that other codebases write: LlamaGen's codes, MAR's moments, RAR's and TiTok's JSON lines."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vistok.data.tar import UNCONDITIONAL, check_class


class PeerSample(NamedTuple):
    """One sample of another codebase's cache.

    Attributes:
        values: ids (V, L), or raw moments (V, 2D, h, w): means, then log-variances.
        label: class id, or -1 for none.
        where: its file, and line.
    """

    values: np.ndarray
    label: int
    where: str


class PeerCacheError(ValueError):
    """A cache of another codebase that is not as that codebase writes it."""


class LlamaGenCodes:
    """LlamaGen's extracted codes: ``NAME_codes/i.npy`` of (1, V, L) and ``NAME_labels/i.npy`` of (1,), in one folder.

    Raises:
        PeerCacheError: no such two folders, or codes without their label.
    """

    def __init__(self, root: Path) -> None:
        codes, labels = ([path for path in root.glob(f"*_{kind}") if path.is_dir()] for kind in ("codes", "labels"))
        if len(codes) != 1 or len(labels) != 1:
            raise PeerCacheError(f"{root} must hold one folder …_codes and one …_labels, as LlamaGen's extraction does")
        self._files = sorted(codes[0].glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
        self._labels = labels[0]
        missing = [path.name for path in self._files if not (self._labels / path.name).exists()]
        if missing:
            raise PeerCacheError(f"{len(missing)} codes have no label in {self._labels}, such as {missing[0]}")
        self.classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PeerSample]:
        for path in self._files:
            codes, label = _load(path), _load(self._labels / path.name)
            if codes.ndim != 3 or codes.shape[0] != 1 or label.size != 1:
                raise PeerCacheError(f"{path} holds codes {codes.shape} with a label {label.shape}; expected (1, V, L)")
            yield PeerSample(_ids(codes[0], str(path)), _label(label.item(), str(self._labels / path.name)), str(path))


class MarMoments:
    """MAR's cached moments: ``CLASS/NAME.npz`` with "moments" and "moments_flip" of (2D, h, w): two views."""

    def __init__(self, root: Path) -> None:
        self._files = sorted(root.glob("*/*.npz"))
        self.classes = tuple(sorted({path.parent.name for path in self._files}))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PeerSample]:
        labels = {name: label for label, name in enumerate(self.classes)}
        for path in self._files:
            archive = _load(path)
            if not {"moments", "moments_flip"} <= set(archive):
                raise PeerCacheError(f"{path} holds {sorted(archive)}; expected moments and moments_flip")
            views = np.stack([archive["moments"], archive["moments_flip"]])
            if views.dtype.kind != "f" or not np.isfinite(views).all():
                raise PeerCacheError(f"{path} holds {views.dtype} moments, or some that are not finite")
            yield PeerSample(views, labels[path.parent.name], str(path))


class JsonLines:
    """RAR's and TiTok's pretokenized files: one ``{"class_id": 3, "tokens": [5, 1, …]}`` a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open() as file:
            self._count = sum(1 for line in file if line.strip())
        self.classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[PeerSample]:
        with self._path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._sample(number, line)

    def _sample(self, number: int, line: str) -> PeerSample:
        where = f"{self._path}, line {number}"
        try:
            row = json.loads(line)
            ids, label = np.array(row["tokens"]).reshape(1, -1), row["class_id"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise PeerCacheError(f"{where}: no class_id and tokens ({error!r})") from error
        return PeerSample(_ids(ids, where), _label(label, where), where)


FORMATS = {"llamagen": LlamaGenCodes, "mar": MarMoments, "jsonl": JsonLines}
PeerCache = LlamaGenCodes | MarMoments | JsonLines


def open_peer_cache(format_name: str, root: str | Path) -> PeerCache:
    """Open a cache of another codebase.

    Raises:
        PeerCacheError: an unknown format, nothing at ``root``, or not what the format says.
    """
    root = Path(root)
    if format_name not in FORMATS:
        raise PeerCacheError(f"unknown format {format_name!r}; known: {', '.join(FORMATS)}")
    if not root.exists() or root.is_dir() == (format_name == "jsonl"):
        expected = "a file" if format_name == "jsonl" else "a folder"
        raise PeerCacheError(f"{root} is not {expected}, which the format {format_name} is")
    cache = FORMATS[format_name](root)
    if not len(cache):
        raise PeerCacheError(f"there are no samples in {root}; see `vistok import-tokens --help` for the formats")
    return cache


def check_alike(samples: Sequence[PeerSample]) -> None:
    """Raise PeerCacheError unless all samples have one shape."""
    shapes = {sample.values.shape for sample in samples}
    if len(shapes) > 1:
        raise PeerCacheError(f"samples differ in shape: {sorted(shapes)}; import sets of different crops one by one")


def _ids(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise PeerCacheError(f"{where} holds {values.dtype} in the place of ids, which are integers")
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise PeerCacheError(f"{where} holds the id {values.max()}")
    return values.astype(np.int64)


def _label(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < UNCONDITIONAL:
        raise PeerCacheError(f"{where}: a class id is an integer from 0, or -1 for no class; got {value!r}")
    try:
        check_class(value)
    except ValueError as error:
        raise PeerCacheError(f"{where}: {error}") from error
    return value


def _load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise PeerCacheError(f"{path} cannot be read ({error}); repair or remove it") from error
