"""Writes token caches (:mod:`vistok.data.tokens`): sample by sample, or shard by shard from several processes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from vistok.data.loader import Failures
from vistok.data.ragged import Piece, pack, stored_dtype
from vistok.data.tokens import FORMAT, Content, sample_shape, shard_name, token_dtype
from vistok.types import ConditionSpec, to_json
from vistok.utils.files import atomic_file, atomic_folder, read_json, write_json

NOTHING = ConditionSpec()
Sequences = Mapping[str, Sequence[Sequence[Piece]]]
"""By the name of a part of the condition, the alternatives of every sample."""


class Samples(NamedTuple):
    """Samples in the form that a shard stores: tokens, labels, and the sequences of their condition."""

    tokens: np.ndarray
    labels: np.ndarray
    sequences: Sequences


class TokenShards:
    """Checks samples and writes them as the numbered shards of one cache.

    Args:
        folder: the folder of the shards.
        spec: the fields of the tokenizer's TokenSpec (``dataclasses.asdict``).
        tokenizer_hash: identifies the weights; :meth:`TokenCache.check_tokenizer` compares it.
        views: number of augmented versions of each image.
        content: ``tokens``; ``moments`` of the posteriors of latents; or the ``latents`` that are quantized to the ids
            of several scales.
        classes: names in the order of the labels; empty if unconditional.
        source_fingerprint: of the images, see ``ImageSource.fingerprint``.
        condition: the samples are conditioned on its ``ids``, ``features`` and ``given``, besides classes.
        text: by the name of the part, the encoder that made it from texts; see ``TextEncoder.identity``.
        feature_dtype: the dtype in which features are stored.
    """

    def __init__(
        self,
        folder: Path,
        spec: Mapping[str, Any],
        tokenizer_hash: str,
        *,
        views: int = 1,
        content: Content = "tokens",
        classes: Sequence[str] = (),
        source_fingerprint: str = "",
        condition: ConditionSpec = NOTHING,
        text: Mapping[str, Any] | None = None,
        feature_dtype: Literal["float16", "float32"] = "float16",
    ) -> None:
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.folder, self._spec, self._classes = folder, dict(spec), tuple(classes)
        self._shape, self._dtype = (views, *sample_shape(spec, content)), token_dtype(spec, content)
        self._condition = dataclasses.replace(condition, num_classes=len(classes))
        self._sequences = [name for name in self._condition.parts if name != "labels"]
        kinds = {name: getattr(condition, name) for name in self._sequences}
        self._dtypes = {name: stored_dtype(kind, feature_dtype) for name, kind in kinds.items()}
        self.header = {
            "format": FORMAT,
            "tokenizer": tokenizer_hash,
            "source": source_fingerprint,
            "spec": to_json(dict(spec)),
            "views": views,
            "content": content,
            "classes": list(classes),
        }
        if self._sequences:
            self.header |= {"condition": to_json(self._condition), "dtypes": self._dtypes, "text": dict(text or {})}

    def checked(self, tokens: Tensor, labels: Tensor, sequences: Sequences | None = None) -> Samples:
        """Check samples, and convert them to the form that is stored.

        Args:
            tokens: ids (B, V, L) or (B, V, L, depth), or latents (B, V, L, D), as the spec says; or moments
                (B, V, L, 2D), or latents before quantization (B, V, h * w, D), as ``content`` says.
            labels: (B,) ints; -1 for unconditional samples.
            sequences: by the name of each other part of the condition, the alternatives of every sample: its texts, or
                the given tokens of each view.

        Raises:
            ValueError: shapes, ids or labels do not fit the spec and the classes, or a part is missing.
        """
        stored, classes = _to_numpy(tokens), _to_numpy(labels)
        if stored.shape[1:] != self._shape or classes.shape != stored.shape[:1]:
            raise ValueError(
                f"expected tokens of shape (B, {', '.join(map(str, self._shape))}) and B labels, "
                f"got {stored.shape} and {classes.shape}"
            )
        _check_values("token id", stored, None if self._dtype is np.float32 else self._spec["codebook_size"])
        if self._classes:
            _check_values("label", classes, len(self._classes))
        elif (classes != -1).any():
            raise ValueError("labels must be -1 in a cache without class names; pass classes=…")
        sequences = dict(sequences or {})
        if sorted(sequences) != sorted(self._sequences) or any(len(part) != len(labels) for part in sequences.values()):
            found = {name: len(part) for name, part in sequences.items()}
            raise ValueError(f"expected {len(labels)} samples of {self._sequences or 'no parts'}, got {found}")
        if any(len(given) != self._shape[0] for given in sequences.get("given", ())):
            raise ValueError(f"there must be given tokens for each of the {self._shape[0]} views")
        return Samples(stored.astype(self._dtype), classes.astype(np.int64), sequences)

    def write(self, number: int, samples: Sequence[Samples], failures: Failures | None = None) -> None:
        """Write a shard. The file of labels is written last, and shows that the shard is whole.

        Args:
            samples: from ``checked``, in parts; there may be none.
            failures: the images of this shard that could not be read.
        """
        unreadable = self.folder / f"unreadable-{number:05d}.json"
        if failures:
            write_json(unreadable, failures)
        else:
            unreadable.unlink(missing_ok=True)  # an earlier run may have been killed while it wrote this shard
        arrays: dict[str, np.ndarray] = {}
        for name in self._sequences:
            pieces = [alternatives for part in samples for alternatives in part.sequences[name]]
            values, lengths = pack(pieces, getattr(self._condition, name), self._dtypes[name])
            arrays |= {f"conditions-{name}": values, f"lengths-{name}": lengths}
        nothing = np.empty((0, *self._shape), self._dtype), np.empty(0, np.int64)
        arrays["tokens"] = np.concatenate([nothing[0], *(part.tokens for part in samples)])
        arrays["labels"] = np.concatenate([nothing[1], *(part.labels for part in samples)])
        for kind, array in arrays.items():
            content = io.BytesIO()  # if NumPy writes to a file itself, its error does not say why it fails
            np.save(content, array)
            with atomic_file(self.folder / shard_name(kind, number)) as temporary, temporary.open("wb") as file:
                file.write(content.getbuffer())

    def is_written(self, number: int) -> bool:
        return (self.folder / shard_name("labels", number)).exists()

    def failures(self) -> Failures:
        """The images that could not be read, in all shards that any process has written so far."""
        files = self.folder.glob("unreadable-*.json")
        return {int(index): reason for file in files for index, reason in read_json(file).items()}

    def write_index(self, count: int) -> None:
        """Write index.json, which completes a folder with the shards 0 .. count - 1."""
        sizes = [len(np.load(self.folder / shard_name("labels", number), mmap_mode="r")) for number in range(count)]
        counts = {name: self._count_texts(name, count) for name in self._sequences if name != "given"}
        index = {**self.header, "shards": sizes} | ({"texts": counts} if counts else {})
        write_json(self.folder / "index.json", index)

    def _count_texts(self, name: str, count: int) -> dict[str, int]:
        """How many samples have no text, how many texts there are, and how many were cut."""
        lengths = [np.load(self.folder / shard_name(f"lengths-{name}", number)) for number in range(count)]
        most = getattr(self._condition, name).length
        return {
            "samples_without": sum(int((~(part > 0).any(1)).sum()) for part in lengths),
            "texts": sum(int((part > 0).sum()) for part in lengths),
            "texts_cut": sum(int((part > most).sum()) for part in lengths),
        }


class TokenWriter:
    """Writes a token cache from one process. It is a context manager: the cache appears whole or not at all.

    Args:
        folder: must not exist yet.
        shard_size: samples per file.
        The others are those of :class:`TokenShards`.

    Attributes:
        folder: the temporary folder while the cache is being written; other files in it become part of the cache.

    Raises:
        FileExistsError: on entering, if ``folder`` exists.
        ValueError: on leaving, if nothing was written.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: Mapping[str, Any],
        tokenizer_hash: str,
        *,
        views: int = 1,
        content: Content = "tokens",
        classes: Sequence[str] = (),
        source_fingerprint: str = "",
        condition: ConditionSpec = NOTHING,
        text: Mapping[str, Any] | None = None,
        feature_dtype: Literal["float16", "float32"] = "float16",
        shard_size: int = 16384,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self._target, self._shard_size = Path(folder), shard_size
        self._shards = TokenShards(
            self._target,
            spec,
            tokenizer_hash,
            views=views,
            content=content,
            classes=classes,
            source_fingerprint=source_fingerprint,
            condition=condition,
            text=text,
            feature_dtype=feature_dtype,
        )
        self._pending: list[Samples] = []
        self._count = 0

    def __enter__(self) -> TokenWriter:
        self._stack = ExitStack()
        self.folder = self._shards.folder = self._stack.enter_context(atomic_folder(self._target))
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with self._stack:  # an error in here discards the folder, too
            self._finish()

    def write(self, tokens: Tensor, labels: Tensor, sequences: Sequences | None = None) -> None:
        """Append samples; see :meth:`TokenShards.checked` for shapes and errors."""
        self._pending.append(self._shards.checked(tokens, labels, sequences))
        while sum(len(part.labels) for part in self._pending) >= self._shard_size:
            self._write_shard(self._shard_size)

    def _write_shard(self, size: int) -> None:
        whole = _joined(self._pending)
        self._shards.write(self._count, [_cut(whole, slice(size))])
        self._count += 1
        self._pending = [_cut(whole, slice(size, None))]

    def _finish(self) -> None:
        rest = sum(len(part.labels) for part in self._pending)
        if rest:
            self._write_shard(rest)
        if not self._count:
            raise ValueError(f"no samples were written to {self._target}")
        self._shards.write_index(self._count)


def _joined(parts: Sequence[Samples]) -> Samples:
    sequences = {name: [s for part in parts for s in part.sequences[name]] for name in parts[0].sequences}
    tokens, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "labels"))
    return Samples(tokens, labels, sequences)


def _cut(samples: Samples, rows: slice) -> Samples:
    sequences = {name: part[rows] for name, part in samples.sequences.items()}
    return Samples(samples.tokens[rows], samples.labels[rows], sequences)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16


def _check_values(what: str, values: np.ndarray, count: int | None) -> None:
    """Raise ValueError unless all values are integers in 0..count-1; None accepts any values."""
    if count is None or not values.size:
        return
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what}s must be integers, got {values.dtype}")
    wrong = values[(values < 0) | (values >= count)]
    if wrong.size:
        raise ValueError(f"{what} {wrong[0]} is out of range 0..{count - 1}")
