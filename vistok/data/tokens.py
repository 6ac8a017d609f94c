"""The token cache: what a tokenizer made of a data set, in memory-mapped shards.

A cache is a folder::

    index.json            what made it (the tokenizer's hash and token spec), class names, sample counts
    tokens-00000.npy      (N, V, L) or (N, V, L, depth) ids, or (N, V, L, D) latents; V augmentation views. Of latents
                          with a posterior, (N, V, L, 2D) moments (means, log-variances), sampled when they are read
    labels-00000.npy      (N,) int64; -1 where there are no classes
    tokens-00001.npy      …

Ids are uint16 where the codebook allows, else int32; latents and moments are float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vistok.data.loader import Failures, Loader
from vistok.data.order import ShuffledOrder
from vistok.draws import Keys
from vistok.files import atomic_folder, write_json
from vistok.types import to_json

FORMAT = "vistok-tokens-1"
Content = Literal["tokens", "moments"]


class TokenBatch(NamedTuple):
    """Cached tokens of one batch.

    Attributes:
        tokens: (B, L) or (B, L, depth) int64 ids, or (B, L, D) float32 latents.
        labels: (B,) int64; -1 where there are no classes.
        indices: (B,) int64, positions in the cache.
    """

    tokens: Tensor
    labels: Tensor
    indices: Tensor


class TokenCacheError(ValueError):
    """A folder that is no (whole) token cache, or one that another tokenizer made."""


class TokenWriter:
    """Writes a token cache; used as a context manager, it appears whole or not at all.

    Args:
        folder: must not exist yet.
        spec: the fields of the tokenizer's TokenSpec (``dataclasses.asdict``).
        tokenizer_hash: identifies the weights; :meth:`TokenCache.check_tokenizer` compares it.
        views: tokens of how many augmented versions of each image are written.
        content: what is written of continuous tokens: latents, or the moments of their posteriors.
        classes: names in the order of the labels; empty if unconditional.
        source_fingerprint: of the images, see ``ImageSource.fingerprint``.
        shard_size: samples per file.

    Attributes:
        folder: where the cache lies while it is being written; what else is put there becomes part of it.

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
        shard_size: int = 16384,
    ) -> None:
        for name, value in (("views", views), ("shard_size", shard_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._target, self._spec, self._classes = Path(folder), dict(spec), tuple(classes)
        self._shard_size = shard_size
        self._shape = (views, *sample_shape(spec, content))
        self._header = {
            "format": FORMAT,
            "tokenizer": tokenizer_hash,
            "source": source_fingerprint,
            "spec": to_json(dict(spec)),
            "views": views,
            "content": content,
            "classes": list(classes),
        }
        self._tokens: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._shards: list[int] = []

    def __enter__(self) -> TokenWriter:
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(atomic_folder(self._target))
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with self._stack:  # a failure to finish discards the folder, too
            self._finish()

    def write(self, tokens: Tensor, labels: Tensor) -> None:
        """Append samples.

        Args:
            tokens: (B, V, L) or (B, V, L, depth) ids, or (B, V, L, D) latents, as the spec says; or moments
                (B, V, L, 2D).
            labels: (B,) ints; -1 for unconditional samples.

        Raises:
            ValueError: shapes, ids or labels that do not fit the spec and the classes.
        """
        tokens, labels = _to_numpy(tokens), _to_numpy(labels)
        if tokens.shape[1:] != self._shape or labels.shape != tokens.shape[:1]:
            raise ValueError(
                f"expected tokens of shape (B, {', '.join(map(str, self._shape))}) and B labels, "
                f"got {tokens.shape} and {labels.shape}"
            )
        _check_range("token id", tokens, self._spec["codebook_size"])
        if self._classes:
            _check_range("label", labels, len(self._classes))
        elif (labels != -1).any():
            raise ValueError("labels must be -1 in a cache without class names; pass classes=…")
        self._tokens.append(tokens.astype(token_dtype(self._spec)))
        self._labels.append(labels.astype(np.int64))
        while sum(map(len, self._labels)) >= self._shard_size:
            self._write_shard(self._shard_size)

    def _write_shard(self, count: int) -> None:
        tokens, labels = np.concatenate(self._tokens), np.concatenate(self._labels)
        np.save(self.folder / _shard("tokens", len(self._shards)), tokens[:count])
        np.save(self.folder / _shard("labels", len(self._shards)), labels[:count])
        self._shards.append(count)
        self._tokens, self._labels = [tokens[count:]], [labels[count:]]

    def _finish(self) -> None:
        rest = sum(map(len, self._labels))
        if rest:
            self._write_shard(rest)
        if not self._shards:
            raise ValueError(f"no samples were written to {self._target}")
        write_json(self.folder / "index.json", {**self._header, "shards": self._shards})


class TokenCache:
    """Reads a token cache. Nothing is loaded until a batch asks for it.

    Attributes:
        spec: the fields of the TokenSpec (lists where it has tuples; TokenSpec takes both).
        tokenizer_hash, source_fingerprint, views, content, classes: see :class:`TokenWriter`.

    Raises:
        TokenCacheError: no token cache, or one with a missing, truncated or foreign shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.spec: dict[str, Any] = index["spec"]
        self.tokenizer_hash: str = index["tokenizer"]
        self.source_fingerprint: str = index["source"]
        self.views: int = index["views"]
        self.content: Content = index.get("content", "tokens")
        self.classes: tuple[str, ...] = tuple(index["classes"])
        counts: list[int] = index["shards"]
        self._ends = np.cumsum(counts)
        self._shape = sample_shape(self.spec, self.content)
        shape, dtype = (self.views, *self._shape), token_dtype(self.spec)
        self._tokens = [self._map("tokens", i, (n, *shape), dtype) for i, n in enumerate(counts)]
        self._labels = np.concatenate([self._map("labels", i, (n,), np.int64) for i, n in enumerate(counts)])

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        return TokenCache, (self.folder,)  # a pickled memory map would carry all its data to every worker

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> Tensor:
        """(N,) int64, of all samples."""
        return torch.from_numpy(self._labels)

    def batch(self, indices: np.ndarray | Sequence[int], views: np.ndarray | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read one view of each sample.

        Args:
            indices: (B,) positions in the cache.
            views: (B,) which augmented version of each.

        Returns:
            tokens (B, L[, depth]) int64, or latents (B, L, D) or moments (B, L, 2D) float32; and labels (B,) int64.

        Raises:
            IndexError: an index or a view that the cache lacks.
        """
        indices, views = np.asarray(indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        for name, values, count in (("index", indices, len(self)), ("view", views, self.views)):
            if values.size and not 0 <= values.min() <= values.max() < count:
                raise IndexError(f"{name} out of range 0..{count - 1}: {values[(values < 0) | (values >= count)][0]}")
        discrete = self.spec["codebook_size"] is not None
        tokens = np.empty((len(indices), *self._shape), dtype=np.int64 if discrete else np.float32)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            rows = shards == shard
            start = self._ends[shard] - len(self._tokens[shard])
            tokens[rows] = self._tokens[shard][indices[rows] - start, views[rows]]
        return torch.from_numpy(tokens), torch.from_numpy(self._labels[indices])

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Raise TokenCacheError unless the tokenizer with this hash made the cache."""
        if tokenizer_hash != self.tokenizer_hash:
            raise TokenCacheError(
                f"{self.folder} was made by another tokenizer: its hash is {self.tokenizer_hash}, this tokenizer's is "
                f"{tokenizer_hash}; make a cache of this one with `vistok tokenize`, or name the tokenizer that made it"
            )

    def _map(self, kind: str, number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        path = self.folder / _shard(kind, number)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise TokenCacheError(f"token cache {self.folder} is incomplete: {path.name} is missing") from error
        except (ValueError, OSError, EOFError) as error:
            raise TokenCacheError(f"{path} is damaged or truncated ({error}); make the cache again") from error
        if array.shape != shape or array.dtype != dtype:
            raise TokenCacheError(
                f"{path} holds {array.dtype} {array.shape}, index.json says {np.dtype(dtype)} {shape}; "
                "make the cache again"
            )
        return array


class TokenBatches:
    """Reads batches of a cache, each sample in one view, latents with a posterior as one sample of it; both drawn by
    (seed, epoch, index)."""

    def __init__(self, cache: TokenCache, *, seed: int = 0) -> None:
        self.cache, self.seed = cache, seed

    def __len__(self) -> int:
        return len(self.cache)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[TokenBatch, Failures]:
        views, keys = np.zeros(len(indices), dtype=np.int64), Keys.of(self.seed, indices, step=epoch)
        if self.cache.views > 1:
            views = (keys.uniform("view").double() * self.cache.views).long().numpy()
        tokens, labels = self.cache.batch(indices, views)
        if self.cache.content == "moments":
            spec = self.cache.spec
            tokens = sample_moments(tokens, keys.normal("posterior", spec["length"], spec["dim"]))
        return TokenBatch(tokens, labels, torch.from_numpy(np.array(indices))), {}


def token_loader(
    cache: TokenCache, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> Loader[TokenBatch]:
    """Shuffled whole batches of a cache for training; ``batch_size`` is per process."""
    order = ShuffledOrder(len(cache), batch_size, seed, rank, world_size)
    return Loader(TokenBatches(cache, seed=seed), order, num_workers=num_workers)


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents (..., D) of normal distributions given by their means and log-variances (..., 2D), with standard normal
    noise (..., D)."""
    mean, log_variance = moments.chunk(2, -1)
    return mean + (log_variance / 2).exp() * noise


def sample_shape(spec: Mapping[str, Any], content: Content = "tokens") -> tuple[int, ...]:
    """Shape of what a cache stores of one sample, under the fields of a TokenSpec: (L,), (L, depth), (L, D) or, of
    moments, (L, 2D)."""
    if spec["codebook_size"] is None:
        return (spec["length"], spec["dim"] * (2 if content == "moments" else 1))
    return (spec["length"],) if spec["depth"] == 1 else (spec["length"], spec["depth"])


def token_dtype(spec: Mapping[str, Any]) -> Any:
    """The type that a cache stores these tokens in."""
    if spec["codebook_size"] is None:
        return np.float32
    return np.uint16 if spec["codebook_size"] <= 1 << 16 else np.int32


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16


def _check_range(what: str, values: np.ndarray, count: int | None) -> None:
    """Refuse integers outside 0..count-1; None means that the values are not ids."""
    if count is None or not values.size:
        return
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what}s must be integers, got {values.dtype}")
    wrong = values[(values < 0) | (values >= count)]
    if wrong.size:
        raise ValueError(f"{what} {wrong[0]} is out of range 0..{count - 1}")


def _shard(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.npy"


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "index.json").read_text())
    except FileNotFoundError as error:
        raise TokenCacheError(f"{folder} is no token cache: no index.json (`vistok tokenize` makes one)") from error
    except ValueError as error:
        raise TokenCacheError(f"{folder}/index.json is damaged ({error}); make the cache again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise TokenCacheError(f"{folder}/index.json is not in the format {FORMAT!r} that this version of vistok reads")
    return index
