"""Token caches that other codebases write. The format of a single system lies with that system; JSON lines are here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from vistok.checkpoints import registry
from vistok.data.files import NPY_ERRORS
from vistok.data.tar import UNCONDITIONAL, check_class


class PeerSample(NamedTuple):
    """One sample of another codebase's cache.

    Attributes:
        values: ids (V, L), or raw moments (V, 2D, h, w): means, then log-variances.
        label: class id, or -1 for none.
        where: its file and line, for messages.
    """

    values: np.ndarray
    label: int
    where: str


class PeerCacheError(ValueError):
    """A cache of another codebase is not in the format of that codebase."""


class PeerCache(ABC):
    """The samples of another codebase's cache, in a folder or a file.

    Attributes:
        is_file: whether the cache is one file; otherwise it is a folder.
        classes: their names in the order of the labels, if the cache has them.
    """

    is_file: ClassVar[bool] = False
    classes: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, root: Path) -> None:
        """Raise PeerCacheError if ``root`` is not such a cache."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[PeerSample]: ...


class JsonLines(PeerCache):
    """Pretokenized files in the format of RAR and TiTok: one ``{"class_id": 3, "tokens": [5, 1, …]}`` per line."""

    is_file = True

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._count = sum(1 for line in file if line.strip())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[PeerSample]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._sample(number, line)

    def _sample(self, number: int, line: bytes) -> PeerSample:
        where = f"{self._path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))  # editors on Windows begin a file with a byte order mark
            tokens, label = row["tokens"], row["class_id"]
        except UnicodeDecodeError as error:  # whose own words hold the whole line
            raise PeerCacheError(f"{where}: no class_id and tokens (it is no text in UTF-8: {error.reason})") from error
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise PeerCacheError(f"{where}: no class_id and tokens ({error!r})") from error
        odd = [value for value in tokens if type(value) is not int] if isinstance(tokens, list) else [tokens]
        if odd:
            raise PeerCacheError(f"{where}: tokens are one list of ids, which are integers; got {odd[0]!r}"[:500])
        try:
            ids = np.array([tokens], dtype=np.int64)
        except OverflowError as error:
            raise PeerCacheError(f"{where} holds the id {max(tokens, key=abs)}"[:500]) from error
        return PeerSample(ids, checked_label(label, where), where)


def formats() -> dict[str, type[PeerCache]]:
    """All formats by name: those of single systems, from the registry, and JSON lines, which several systems share."""
    return registry.token_files() | {"jsonl": JsonLines}


def open_peer_cache(format_name: str, root: str | Path) -> PeerCache:
    """Open a cache of another codebase.

    Raises:
        PeerCacheError: an unknown format, or ``root`` does not exist, is not in this format, or holds no samples.
    """
    root = Path(root)
    known = formats()
    if format_name not in known:
        raise PeerCacheError(f"unknown format {format_name!r}; known: {', '.join(known)}")
    kind = known[format_name]
    if not root.exists() or root.is_dir() == kind.is_file:
        expected = "a file" if kind.is_file else "a folder"
        raise PeerCacheError(f"{root} is not {expected}, which the format {format_name} is")
    cache = kind(root)
    if not len(cache):
        raise PeerCacheError(f"there are no samples in {root}; see `vistok import-tokens --help` for the formats")
    return cache


def check_alike(samples: Sequence[PeerSample]) -> None:
    """Raise PeerCacheError unless all samples have one shape."""
    first, *_ = samples
    for sample in samples:
        if sample.values.shape != first.values.shape:
            shapes = sorted({first.values.shape, sample.values.shape})
            raise PeerCacheError(
                f"samples differ in shape: {shapes}, such as {first.where} and {sample.where}; import sets of "
                "different crops one by one"
            )


def checked_ids(values: np.ndarray, where: str) -> np.ndarray:
    """``values`` as int64. Raises PeerCacheError, with ``where``, if they are not integers or do not fit."""
    if values.dtype.kind not in "iu":
        raise PeerCacheError(f"{where} holds {values.dtype} in the place of ids, which are integers")
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise PeerCacheError(f"{where} holds the id {values.max()}")
    return values.astype(np.int64)


def checked_label(value: Any, where: str) -> int:
    """``value`` if it is a class id or -1. Raises PeerCacheError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < UNCONDITIONAL:
        raise PeerCacheError(f"{where}: a class id is an integer from 0, or -1 for no class; got {value!r}")
    try:
        check_class(value)
    except ValueError as error:
        raise PeerCacheError(f"{where}: {error}") from error
    return value


def load_array(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a .npy file, or the arrays of an .npz file. Raises PeerCacheError if it cannot be read."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        arrays = dict(loaded)
        if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"its member {other[0]!r} is no array")
        return arrays
    except NPY_ERRORS as error:
        # NumPy takes whatever it does not know for a pickle, and says how to run what is in it.
        reason = "no file of NumPy, or one with Python objects in it" if "pickle" in str(error) else error
        raise PeerCacheError(f"{path} cannot be read ({reason}); repair or remove it") from error
