"""The token cache: the tokens of a data set, in memory-mapped shards.

A cache is a folder::

    index.json            the tokenizer's hash and token spec, class names, sample counts
    tokens-00000.npy      ids (N, V, L) or (N, V, L, depth), or latents (N, V, L, D), of V augmentation views. For
                          latents with a posterior, moments (N, V, L, 2D): means, then log-variances, which are sampled
                          when they are read. For ids of scales, on request, the latents before quantization
                          (N, V, h * w, D)
    labels-00000.npy      (N,) int64; -1 if there are no classes
    conditions-features-00000.npy, lengths-features-00000.npy
                          the other parts of the condition ("ids", "features", "given") that index.json describes, if
                          any (see :mod:`vistok.data.ragged`)
    unreadable-00000.json position and reason of the images that could not be read and are left out, if there are any
    tokens-00001.npy      …

Ids are uint16 if the codebook allows it, else int32 or int64; latents and moments are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vistok.data.files import NPY_ERRORS
from vistok.data.loader import Failures, Loader
from vistok.data.order import SequentialOrder, ShuffledOrder
from vistok.data.ragged import RaggedShard
from vistok.draws import Keys
from vistok.signatures import check
from vistok.types import Condition, ConditionSpec, FeatureSpec, TokenSpec
from vistok.utils.files import read_json

FORMAT = "vistok-tokens-1"
Content = Literal["tokens", "moments", "latents"]
"""What a cache stores; "latents" are those before quantization, of tokenizers with ids of several scales."""


class TokenBatch(NamedTuple):
    """Cached tokens of one batch.

    Attributes:
        tokens: ids (B, L) or (B, L, depth) int64, or latents (B, L, D) float32; (B, h * w, D) before quantization.
        condition: of the B samples.
        indices: (B,) int64, positions in the cache.
    """

    tokens: Tensor
    condition: Condition
    indices: Tensor


class TokenCacheError(ValueError):
    """A folder is not a (whole) token cache, or another tokenizer made it."""


class TokenCache:
    """Reads a token cache. Tokens are memory-mapped, and read only when a batch needs them.

    Attributes:
        spec: the fields of the TokenSpec (with lists in place of tuples; TokenSpec takes both).
        condition_spec: the spec of the samples' condition.
        texts: by the part made from texts, how many texts there are, how many were cut, and how many samples have none.
        tokenizer_hash, source_fingerprint, views, content, classes, text: see
            :class:`vistok.data.token_writer.TokenShards`.

    Raises:
        TokenCacheError: the folder is not a token cache, or a shard is missing, truncated or does not fit index.json.
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
        shape, dtype = (self.views, *self._shape), token_dtype(self.spec, self.content)
        self._tokens = [self._map("tokens", i, (n, *shape), dtype) for i, n in enumerate(counts)]
        self._labels = np.concatenate([self._map("labels", i, (n,), np.int64) for i, n in enumerate(counts)])
        self.condition_spec = _condition_spec(index, self.folder)
        self.text: dict[str, Any] = index.get("text", {})
        self.texts: dict[str, dict[str, int]] = index.get("texts", {})
        dtypes = index.get("dtypes", {})
        self._sequences = {
            name: [self._ragged(name, i, n, dtypes[name]) for i, n in enumerate(counts)]
            for name in self.condition_spec.parts
            if name != "labels"
        }

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        return TokenCache, (self.folder,)  # a pickled memory map would carry all its data to every worker

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> Tensor:
        """The labels (N,) int64 of all samples."""
        return torch.from_numpy(self._labels)

    @property
    def view_shares(self) -> np.ndarray:
        """How often each view is drawn, (views,) float64: all equally often."""
        return np.full(self.views, 1 / self.views)

    def batch(self, indices: np.ndarray | Sequence[int], views: np.ndarray | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read one view of each sample.

        Args:
            indices: (B,) positions in the cache.
            views: (B,) which augmented version of each.

        Returns:
            Ids (B, L[, depth]) int64, or latents (B, L, D) or moments (B, L, 2D) float32; and labels (B,) int64.

        Raises:
            IndexError: an index or a view is out of range.
        """
        indices, views = np.asarray(indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        _check_indices("index", indices, len(self))
        _check_indices("view", views, self.views)
        ids = self.spec["codebook_size"] is not None and self.content == "tokens"
        tokens = np.empty((len(indices), *self._shape), dtype=np.int64 if ids else np.float32)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            rows = shards == shard
            start = self._ends[shard] - len(self._tokens[shard])
            tokens[rows] = self._tokens[shard][indices[rows] - start, views[rows]]
        return torch.from_numpy(tokens), torch.from_numpy(self._labels[indices])

    def condition(self, indices: np.ndarray, views: np.ndarray, uniforms: np.ndarray) -> Condition:
        """The condition of the samples at ``indices`` (B,).

        Args:
            views: (B,) the views that the given tokens belong to.
            uniforms: (B,) in [0, 1); chooses one of a sample's texts. The condition of a sample without texts is
                dropped.
        """
        parts = [Condition.from_labels(torch.from_numpy(self._labels[indices]))] if self.classes else []
        shards = np.searchsorted(self._ends, indices, side="right")
        for name, sequences in self._sequences.items():
            spec, ids = getattr(self.condition_spec, name), name == "ids"
            inner = (spec.dim,) if isinstance(spec, FeatureSpec) else ()
            values = np.zeros((len(indices), spec.length, *inner), np.float32 if inner else np.int64)
            mask = np.zeros((len(indices), spec.length), dtype=bool)
            for shard in np.unique(shards):
                rows, part = shards == shard, sequences[shard]
                places = indices[rows] - (self._ends[shard] - len(part.counts))
                drawn = views[rows] if name == "given" else (uniforms[rows] * part.counts[places]).astype(np.int64)
                values[rows], mask[rows] = part.read(places, drawn)
            absent = ~mask.any(1)
            mask[absent] = True  # a null text is whole
            tensors = torch.from_numpy(values), torch.from_numpy(mask)
            if name == "given":
                part = Condition.from_given(tensors[0], None if mask.all() else tensors[1])
            else:
                part = Condition.from_ids(*tensors) if ids else Condition.from_features(*tensors)
            parts.append(part.drop(torch.from_numpy(absent)))
        return Condition.together(*parts) if parts else Condition.none(len(indices))

    def text_of(self, indices: np.ndarray, number: int) -> Condition:
        """The ids of the text number ``number`` of the samples at ``indices`` (B,); dropped if a sample has fewer.

        Raises:
            ValueError: the cache has no texts.
        """
        shards, spec = np.searchsorted(self._ends, indices, side="right"), self.condition_spec.ids
        if spec is None:
            raise ValueError(f"{self.folder} has no texts")
        shape = (len(indices), spec.length)
        values, mask = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        for shard in np.unique(shards):
            part = self._sequences["ids"][shard]
            places = indices - (self._ends[shard] - len(part.counts))
            rows = np.flatnonzero(shards == shard)
            rows = rows[part.counts[places[rows]] > number]
            values[rows], mask[rows] = part.read(places[rows], np.full(len(rows), number))
        absent = ~mask.any(1)
        mask[absent] = True  # a null text is whole
        return Condition.from_ids(torch.from_numpy(values), torch.from_numpy(mask)).drop(torch.from_numpy(absent))

    def check_texts(self, count: int) -> None:
        """Raise TokenCacheError unless some sample has that many texts."""
        most = max((int(part.counts.max()) for part in self._sequences.get("ids", ()) if len(part.counts)), default=0)
        if count > most:
            raise TokenCacheError(f"a template wants text {count - 1} of samples, but {self.folder} has {most} of each")

    def _ragged(self, name: str, number: int, count: int, dtype: str) -> RaggedShard:
        spec = getattr(self.condition_spec, name)
        lengths = self._load(f"lengths-{name}", number)
        inner = (spec.dim,) if isinstance(spec, FeatureSpec) else ()
        if lengths.ndim != 2 or len(lengths) != count or lengths.dtype != np.int32 or (lengths < 0).any():
            raise TokenCacheError(f"{self.folder}/{shard_name(f'lengths-{name}', number)} is damaged; make it again")
        total = int(np.minimum(lengths, spec.length).sum())
        values = self._map(f"conditions-{name}", number, (total, *inner), np.dtype(dtype))
        return RaggedShard(values, np.asarray(lengths), spec.length)

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Raise TokenCacheError unless the tokenizer with this hash made the cache."""
        if tokenizer_hash != self.tokenizer_hash:
            raise TokenCacheError(
                f"{self.folder} was made by another tokenizer: its hash is {self.tokenizer_hash}, this tokenizer's is "
                f"{tokenizer_hash}; make a cache of this one with `vistok tokenize`, or name the tokenizer that made it"
            )

    def _load(self, kind: str, number: int) -> np.ndarray:
        path = self.folder / shard_name(kind, number)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise TokenCacheError(f"token cache {self.folder} is incomplete: {path.name} is missing") from error
        except NPY_ERRORS as error:
            raise TokenCacheError(f"{path} is damaged or truncated ({error}); make the cache again") from error

    def _map(self, kind: str, number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        path, array = self.folder / shard_name(kind, number), self._load(kind, number)
        if array.shape != shape or array.dtype != dtype:
            raise TokenCacheError(
                f"{path} holds {array.dtype} {array.shape}, index.json says {np.dtype(dtype)} {shape}; "
                "make the cache again"
            )
        return array


class TokenMixture:
    """Several caches that one tokenizer made of the same images, read as one cache with the views of all of them.

    LlamaGen (arXiv 2406.06525) trains on ten crops of images of two sizes in this way.

    Args:
        caches: one or more.
        weights: how often each cache is drawn, relative to the others; equally often by default.

    Attributes:
        folder: of the first cache.
        view_shares: how often each view is drawn, (views,) float64; they sum to one. A cache's share is spread evenly
            over its views.
        spec, tokenizer_hash, views, content, classes, text, condition_spec, labels: as in a cache.

    Raises:
        TokenCacheError: the caches are of different images or tokenizers.
        ValueError: ``weights`` are not one positive number per cache.
    """

    def __init__(self, caches: Sequence[TokenCache], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(caches) if weights is None else list(weights)
        if len(weights) != len(caches) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"{len(caches)} token caches need as many token_weights above 0, or none; got {weights}")
        self.caches = tuple(caches)
        first, *others = self.caches
        for other in others:
            _check_alike(first, other)
        self.folder, self.spec, self.tokenizer_hash = first.folder, first.spec, first.tokenizer_hash
        self.content, self.classes, self.text = first.content, first.classes, first.text
        self.condition_spec = first.condition_spec
        self._ends = np.cumsum([cache.views for cache in self.caches])
        self.views = int(self._ends[-1])
        shares = [np.full(cache.views, weight / cache.views) for cache, weight in zip(self.caches, weights)]
        self.view_shares = np.concatenate(shares) / sum(weights)

    def __len__(self) -> int:
        return len(self.caches[0])

    @property
    def labels(self) -> Tensor:
        """The labels (N,) int64 of all samples."""
        return self.caches[0].labels

    def batch(self, indices: np.ndarray | Sequence[int], views: np.ndarray | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read one view of each sample; see :meth:`TokenCache.batch`."""
        indices, views = np.asarray(indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        _check_indices("view", views, self.views)
        parts, back = [], []
        for cache, rows, inner in self._owned(views):
            parts.append(cache.batch(indices[rows], inner)[0])
            back.append(rows)
        return torch.cat(parts)[np.argsort(np.concatenate(back))], self.labels[indices]

    def condition(self, indices: np.ndarray, views: np.ndarray, uniforms: np.ndarray) -> Condition:
        """The condition of samples; see :meth:`TokenCache.condition`."""
        parts, back = [], []
        for cache, rows, inner in self._owned(views):
            parts.append(cache.condition(indices[rows], inner, uniforms[rows]))
            back.append(rows)
        return Condition.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(back)))]

    def text_of(self, indices: np.ndarray, number: int) -> Condition:
        """The ids of one text of each sample; see :meth:`TokenCache.text_of`."""
        return self.caches[0].text_of(indices, number)

    def check_texts(self, count: int) -> None:
        """Raise TokenCacheError unless some sample of each cache has that many texts."""
        for cache in self.caches:
            cache.check_texts(count)

    def _owned(self, views: np.ndarray) -> Iterator[tuple[TokenCache, np.ndarray, np.ndarray]]:
        """For each cache: the cache, the positions (n,) in ``views`` of its own views, and their numbers in it (n,)."""
        owners = np.searchsorted(self._ends, views, side="right")
        for number, (cache, end) in enumerate(zip(self.caches, self._ends)):
            rows = np.flatnonzero(owners == number)
            yield cache, rows, views[rows] - (end - cache.views)

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Raise TokenCacheError unless the tokenizer with this hash made the caches."""
        self.caches[0].check_tokenizer(tokenizer_hash)


class TokenBatches:
    """Reads batches of a cache: each sample in one view, with one of its texts; moments become a sample of the
    posterior. All choices are drawn by (seed, epoch, index).

    Args:
        parts: the parts of the condition to return; None is all that the cache has.
    """

    def __init__(self, cache: TokenCache | TokenMixture, *, seed: int = 0, parts: Sequence[str] | None = None) -> None:
        self.cache, self.seed = cache, seed
        self.parts = cache.condition_spec.parts if parts is None else tuple(parts)
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.cache)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[TokenBatch, Failures]:
        views, uniforms = (drawn[indices] for drawn in self._draw(epoch))
        tokens, _ = self.cache.batch(indices, views)
        if self.cache.content == "moments":
            spec, keys = self.cache.spec, Keys.of(self.seed, indices, step=epoch)
            tokens = sample_moments(tokens, keys.normal("posterior", spec["length"], spec["dim"]))
        condition = self.cache.condition(indices, views, uniforms).only(self.parts)
        return TokenBatch(tokens, condition, torch.from_numpy(np.array(indices))), {}

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The view (N,) of every sample, and uniform numbers (N,) that choose its text.

        They are drawn at once, because a generator per sample would take longer than reading.
        """
        if self._drawn is None or self._drawn[0] != epoch:
            keys, count = Keys(self.seed, (0,), step=epoch), len(self.cache)
            views, texts = (keys.uniform(name, count)[0].double().numpy() for name in ("views", "texts"))
            inner_ends = np.cumsum(self.cache.view_shares)[:-1]
            self._drawn = epoch, np.searchsorted(inner_ends, views, side="right"), texts
        return self._drawn[1:]


def token_loader(
    cache: TokenCache | TokenMixture,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    parts: Sequence[str] | None = None,
) -> Loader[TokenBatch]:
    """Whole batches of a cache or a mixture in a random order, for training.

    ``batch_size`` is per process; for ``parts`` see :class:`TokenBatches`.
    """
    order = ShuffledOrder(len(cache), batch_size, seed, rank, world_size)
    return Loader(TokenBatches(cache, seed=seed, parts=parts), order, num_workers=num_workers)


def token_evaluation_loader(
    cache: TokenCache, batch_size: int, *, seed: int = 0, parts: Sequence[str] | None = None
) -> Loader[TokenBatch]:
    """Every sample once, in order."""
    return Loader(TokenBatches(cache, seed=seed, parts=parts), SequentialOrder(len(cache), batch_size, seed))


def _check_alike(one: TokenCache, other: TokenCache) -> None:
    """Raise TokenCacheError unless one tokenizer made both caches of the same images."""
    sides = [
        {
            "tokenizer": cache.tokenizer_hash,
            "shape of tokens": (cache.spec, cache.content),
            "images": (cache.source_fingerprint, cache.classes, cache.labels.tolist()),
            "condition": (cache.condition_spec, cache.text),
        }
        for cache in (one, other)
    ]
    differing = [name for name, value in sides[0].items() if sides[1][name] != value]
    if differing:
        raise TokenCacheError(
            f"{other.folder} cannot be mixed with {one.folder}: their {' and '.join(differing)} differ; mix caches "
            "that one tokenizer made of the same images"
        )


def _check_indices(name: str, values: np.ndarray, count: int) -> None:
    """Raise IndexError unless all values lie in 0 .. count - 1."""
    if values.size and not 0 <= values.min() <= values.max() < count:
        raise IndexError(f"{name} out of range 0..{count - 1}: {values[(values < 0) | (values >= count)][0]}")


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents (..., D): samples of normal distributions with the given moments, by standard normal noise (..., D).

    ``moments`` (..., 2D) are means, then log-variances.
    """
    mean, log_variance = moments.chunk(2, -1)
    return mean + (log_variance / 2).exp() * noise


def sample_shape(spec: Mapping[str, Any], content: Content = "tokens") -> tuple[int, ...]:
    """The shape in which a cache stores one view of a sample, from the fields of a TokenSpec.

    (L,) or (L, depth) for ids, (L, D) for latents, (L, 2D) for moments, (h * w, D) for latents before quantization.
    """
    if content == "latents":
        return (math.prod(spec["scales"][-1]), spec["dim"])
    if spec["codebook_size"] is None:
        return (spec["length"], spec["dim"] * (2 if content == "moments" else 1))
    return (spec["length"],) if spec["depth"] == 1 else (spec["length"], spec["depth"])


def token_dtype(spec: Mapping[str, Any], content: Content = "tokens") -> Any:
    """The dtype in which a cache stores these tokens."""
    size = spec["codebook_size"]
    if size is None or content == "latents":
        return np.float32
    return np.uint16 if size <= 1 << 16 else np.int32 if size <= 1 << 31 else np.int64


def shard_name(kind: str, number: int) -> str:
    """The name of a shard's file; ``kind`` is "tokens", "labels", "conditions-ids", "lengths-ids", …"""
    return f"{kind}-{number:05d}.npy"


def _condition_spec(index: Mapping[str, Any], folder: Path) -> ConditionSpec:
    """The condition that index.json describes; caches of version 0.1 have classes only."""
    try:
        spec = ConditionSpec(**{**index.get("condition", {}), "num_classes": len(index["classes"])})
        missing = set(spec.parts) - {"labels"} - set(index.get("dtypes", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise TokenCacheError(f"{folder}/index.json describes a condition that is not known: {error}") from error
    if missing:
        raise TokenCacheError(f"{folder}/index.json is damaged: it has no dtypes of {', '.join(sorted(missing))}")
    return spec


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = read_json(folder / "index.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TokenCacheError(f"{folder} is no token cache: no index.json (`vistok tokenize` makes one)") from error
    except ValueError as error:
        raise TokenCacheError(f"{folder}/index.json is damaged ({error}); make the cache again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise TokenCacheError(f"{folder}/index.json is not in the format {FORMAT!r} that this version of vistok reads")
    try:
        known = [item.name for item in fields(_Index)]
        read = _Index(**check(_Index, {key: value for key, value in index.items() if key in known}, ""))
    except (ValueError, TypeError) as error:
        raise TokenCacheError(f"{folder}/index.json is damaged ({error}); make the cache again") from error
    return {**index, "spec": asdict(read.spec) | index["spec"]}  # with the defaults of TokenSpec


@dataclass(frozen=True)
class _Index:
    """The keys of index.json that are checked."""

    spec: TokenSpec
    tokenizer: str
    source: str
    views: int
    classes: tuple[str, ...]
    shards: tuple[int, ...]
    content: Content = "tokens"
    condition: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.spec
        numbers = (spec.length, spec.dim, spec.depth, self.views, *(() if not spec.discrete else (spec.codebook_size,)))
        if min(numbers) < 1:
            raise ValueError(f"length, dim, depth, codebook_size and views must be at least 1, got {numbers}")
        if not self.shards or min(self.shards) < 0 or not sum(self.shards):
            raise ValueError(f"shards must be how many samples each shard has, got {list(self.shards)}")
