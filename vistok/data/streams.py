"""Streams of text and image tokens, for models that read and write both in one sequence.

A template turns a sample of a token cache into a stream. Its segments are texts, images and special tokens, each in the
loss or not. The streams of a batch are padded on the right, with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.loader import Failures, Loader
from vistok.data.order import SequentialOrder, ShuffledOrder
from vistok.data.tokens import TokenBatch, TokenBatches, TokenCache, TokenCacheError, TokenMixture
from vistok.draws import Keys
from vistok.types import Condition, JointVocabulary, TokenKind, TokenSpec

SPECIAL_TOKENS = JointVocabulary(0, 1).specials
PARTS = ("ids", "given")
KINDS: tuple[TokenKind, ...] = ("text", "image", "special")
"""The names of the numbers in ``Streams.kinds``."""
TEXT_KIND, IMAGE_KIND = KINDS.index("text"), KINDS.index("image")


@dataclass(frozen=True)
class Segment:
    """A part of a template.

    Attributes:
        source: ``ids`` (the text), ``tokens`` (the image), ``given`` (the given images), or the name of a special
            token.
        in_loss: whether a model learns to predict it.
        number: for ``ids``, which of a sample's texts; None is the one that the epoch draws. For ``given``, which of
            the given images; None is all of them, one after another.
    """

    source: str
    in_loss: bool = False
    number: int | None = None


@dataclass(frozen=True)
class StreamConfig:
    """How samples become streams.

    Attributes:
        share: how often the template is drawn, relative to the others.
        template: its segments, such as ``begin ids answer begin_image* tokens* end_image*``. A star puts a segment into
            the loss; ``ids:2`` is the third text of a sample, and ``given:1`` its second given image. None takes the
            entry of ``TEMPLATES`` with this name.
    """

    share: float = 1.0
    template: str | None = None


SOURCES = ("ids", "tokens", "given")


def parse_template(text: str) -> tuple[Segment, ...]:
    """The segments of a template; see ``StreamConfig`` for its syntax.

    Raises:
        ValueError: an unknown segment, or no segment in the loss.
    """
    segments = []
    for word in text.split():
        source, _, number = word.rstrip("*").partition(":")
        if source not in (*SOURCES, *SPECIAL_TOKENS) or (number and not (source in PARTS and number.isdecimal())):
            known = ", ".join((*SOURCES, *SPECIAL_TOKENS))
            raise ValueError(
                f"{word!r} is no segment of a template; there are {known}, each with a star or not, and ids:0, "
                "ids:1, … and given:0, given:1, … for one of several texts and images"
            )
        segments.append(Segment(source, word.endswith("*"), int(number) if number else None))
    if not any(segment.in_loss for segment in segments):
        raise ValueError(f"the template {text!r} has nothing in the loss; mark segments with a star, such as tokens*")
    return tuple(segments)


TEMPLATES: dict[str, tuple[Segment, ...]] = {
    "text_to_image": parse_template("begin ids answer begin_image* tokens* end_image*"),
    "image_to_text": parse_template("begin begin_image tokens end_image answer ids* end*"),
    "edit": parse_template("begin begin_image given end_image ids answer begin_image* tokens* end_image*"),
}
"""The templates by name. ``edit`` has an image and an instruction before the image to predict. ``begin`` marks the
start of a question."""


@dataclass(frozen=True)
class Streams:
    """The streams of a batch.

    Attributes:
        ids: (B, N) int64 of the joint vocabulary; where images are latents, the image id 0.
        kinds: (B, N) int8, positions in ``KINDS``.
        in_loss: (B, N) bool, True where a model learns to predict the token.
        mask: (B, N) bool, False in the padding at the end.
        latents: (B, N, D) float, zero at other tokens than those of images; None if images are ids.
    """

    ids: Tensor
    kinds: Tensor
    in_loss: Tensor
    mask: Tensor
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Streams:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Streams:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Streams:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if t is None else function(t) for name, t in tensors.items()}
        return Streams(**changed)

    @classmethod
    def of(cls, segments: Sequence[tuple[Segment, Tensor, Tensor]], vocabulary: JointVocabulary) -> Streams:
        """The streams of a template.

        Args:
            segments: (segment, values, valid) each. Values are (B, n) ids of the segment's own vocabulary or (B, n, D)
                latents, and are ignored for special tokens; ``valid`` is (B, n) bool.
        """
        columns = [_column(segment, values, vocabulary) for segment, values, _ in segments]
        mask = torch.cat([valid for _, _, valid in segments], 1)
        order = (~mask).int().sort(dim=1, stable=True).indices  # the valid ones first, in their order
        length = int(mask.sum(1).max())

        def packed(parts: Sequence[Tensor]) -> Tensor:
            whole = torch.cat(list(parts), 1)
            wide = order.view(*order.shape, *[1] * (whole.ndim - 2)).expand_as(whole)
            return whole.gather(1, wide)[:, :length]

        latents = None
        sizes = {values.shape[2] for _, values, _ in segments if values.ndim == 3}
        if sizes:
            (dim,) = sizes
            latents = packed([v if v.ndim == 3 else torch.zeros(*valid.shape, dim) for _, v, valid in segments])
        ids, kinds, in_loss = (packed(parts) for parts in zip(*columns))
        mask = packed([mask])
        return cls(ids * mask, kinds, in_loss & mask, mask, latents)

    @classmethod
    def cat(cls, streams: Sequence[Streams]) -> Streams:
        """Concatenate the rows of several streams, padded to the longest."""
        length = max(part.ids.shape[1] for part in streams)
        columns: dict[str, Any] = {}
        for field in fields(cls):
            parts = [getattr(part, field.name) for part in streams]
            if parts[0] is None:
                continue
            rows = [part.new_zeros(len(part), length, *part.shape[2:]) for part in parts]
            for row, part in zip(rows, parts, strict=True):
                row[:, : part.shape[1]] = part
            columns[field.name] = torch.cat(rows)
        return cls(**columns)

    def __getitem__(self, rows: Tensor | slice) -> Streams:
        return self._map(lambda tensor: tensor[rows])


def _column(segment: Segment, values: Tensor, vocabulary: JointVocabulary) -> tuple[Tensor, Tensor, Tensor]:
    """Joint ids, kinds and ``in_loss`` of a segment, (B, n) each."""
    rows, count = values.shape[:2]
    if segment.source in vocabulary.specials:
        kind, ids = "special", torch.full((rows, count), vocabulary.special(segment.source))
    elif segment.source == "ids":
        kind, ids = "text", vocabulary.joint(values, "text")
    else:
        own = torch.zeros(rows, count, dtype=torch.int64) if values.ndim == 3 else values
        kind, ids = "image", vocabulary.joint(own, "image")
    kinds = torch.full((rows, count), KINDS.index(kind), dtype=torch.int8)
    return ids, kinds, torch.full((rows, count), segment.in_loss)


class StreamBatches:
    """Reads batches of streams from a cache; each sample's template is drawn by (seed, epoch, index).

    The ``tokens`` of its batches are :class:`Streams`.

    Args:
        streams: by the name of a template, its share (for the entries of ``TEMPLATES``) or a ``StreamConfig``.

    Raises:
        ValueError: an unknown template or segment, or a share that is not above 0.
        TokenCacheError: a template needs ids or given tokens that the cache does not have.
    """

    def __init__(
        self, cache: TokenCache | TokenMixture, streams: Mapping[str, float | StreamConfig], *, seed: int = 0
    ) -> None:
        configs = {
            name: stream if isinstance(stream, StreamConfig) else StreamConfig(stream)
            for name, stream in streams.items()
        }
        unknown = [name for name, config in configs.items() if config.template is None and name not in TEMPLATES]
        if unknown or not configs or min(config.share for config in configs.values()) <= 0:
            raise ValueError(
                f"templates are {', '.join(TEMPLATES)}, or have segments of their own, each with a share above 0; got "
                f"{ {name: config.share for name, config in configs.items()} }"
            )
        self.templates = {
            name: TEMPLATES[name] if config.template is None else parse_template(config.template)
            for name, config in configs.items()
        }
        for name, template in self.templates.items():
            needed = {segment.source for segment in template} & set(PARTS)
            missing = sorted(needed - set(cache.condition_spec.parts))
            if missing:
                raise TokenCacheError(f"the template {name} needs {missing[0]!r}, which {cache.folder} does not have")
            cache.check_texts(_count(template, "ids"))
            images = _given_images(cache)
            if _count(template, "given") > images:
                raise TokenCacheError(
                    f"the template {name} wants given:{_count(template, 'given') - 1}, and {cache.folder} has {images} "
                    "given images of each sample"
                )
        shares = [config.share for config in configs.values()]
        self._ends = np.cumsum(shares) / sum(shares)
        self._tokens, self._cache = TokenBatches(cache, seed=seed), cache
        self.seed, self.vocabulary = seed, joint_vocabulary(cache)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the cache's condition that the streams contain."""
        used = {segment.source for template in self.templates.values() for segment in template}
        return tuple(part for part in self._tokens.parts if part in used)

    @property
    def given_length(self) -> int | None:
        """The most tokens of a ``given`` segment: of one image, or of all if a template takes them together."""
        given = self._cache.condition_spec.given
        together = any(s.source == "given" and s.number is None for t in self.templates.values() for s in t)
        return None if given is None else given.length if together else self._cache.spec["length"]

    def prompts(self, indices: np.ndarray) -> Condition | None:
        """The last question before the image, for samples (B,), in the first template that predicts an image.

        None if no template does.
        """
        for template in self.templates.values():
            drawn = [place for place, segment in enumerate(template) if segment.source == "tokens" and segment.in_loss]
            if drawn:
                batch, _ = self._tokens.load(indices, 0)
                before = template[: drawn[0]]
                turn = max((place for place, segment in enumerate(before) if segment.source == "begin"), default=0)
                asked = [self._part(s, batch.condition, indices) for s in before[turn:] if s.source in PARTS]
                return Condition.together(*asked) if asked else Condition.none(len(indices))
        return None

    def __len__(self) -> int:
        return len(self._tokens)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[TokenBatch, Failures]:
        batch, failures = self._tokens.load(indices, epoch)
        uniforms = Keys.of(self.seed, indices, step=epoch).uniform("templates").double().numpy()
        drawn = np.searchsorted(self._ends[:-1], uniforms, side="right")
        parts, places = [], []
        for number, template in enumerate(self.templates.values()):
            rows = torch.from_numpy(np.flatnonzero(drawn == number))
            if len(rows):
                parts.append(self._streams(template, batch, rows))
                places.append(rows)
        streams: Any = Streams.cat(parts)[torch.cat(places).argsort()]  # takes the field of the tokens
        return batch._replace(tokens=streams), failures

    def _streams(self, template: Sequence[Segment], batch: TokenBatch, rows: Tensor) -> Streams:
        condition, segments = batch.condition[rows], []
        for segment in template:
            if segment.source in self.vocabulary.specials:
                values = torch.zeros(len(rows), 1, dtype=torch.int64)
                valid = torch.ones(len(rows), 1, dtype=torch.bool)
            elif segment.source == "tokens":
                values = batch.tokens[rows]
                valid = torch.ones(values.shape[:2], dtype=torch.bool)
            else:
                part = self._part(segment, condition, batch.indices[rows].numpy()).parts[segment.source]
                values, valid = part.values, part.valid() & ~part.dropped[:, None]  # a missing text is empty
            segments.append((segment, values, valid))
        return Streams.of(segments, self.vocabulary)

    def _part(self, segment: Segment, condition: Condition, indices: np.ndarray) -> Condition:
        """The content of a segment for samples (B,), as a condition of one part."""
        if segment.number is None:
            return condition.only([segment.source])
        if segment.source == "ids":
            return self._cache.text_of(indices, segment.number)
        length, given = self._cache.spec["length"], condition.parts["given"]
        places = slice(segment.number * length, (segment.number + 1) * length)
        return Condition.from_given(given.values[:, places], given.valid()[:, places]).drop(given.dropped)


def _count(template: Sequence[Segment], source: str) -> int:
    """How many texts or given images a sample must have for the numbers in a template."""
    return max((s.number + 1 for s in template if s.source == source and s.number is not None), default=0)


def _given_images(cache: TokenCache | TokenMixture) -> int:
    """The number of whole images that are given for each sample."""
    given = cache.condition_spec.given
    return 0 if given is None else given.length // cache.spec["length"]


def joint_vocabulary(cache: TokenCache | TokenMixture) -> JointVocabulary:
    """The vocabulary that joins a cache's text ids, image ids and the special tokens."""
    spec, ids = TokenSpec(**cache.spec), cache.condition_spec.ids
    return JointVocabulary(0 if ids is None else ids.vocabulary_size, spec.codebook_size or 1)


def stream_loader(
    cache: TokenCache | TokenMixture,
    streams: Mapping[str, float | StreamConfig],
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Loader[TokenBatch]:
    """Whole batches of streams in a random order, for training; ``batch_size`` is per process."""
    order = ShuffledOrder(len(cache), batch_size, seed, rank, world_size)
    return Loader(StreamBatches(cache, streams, seed=seed), order)


def stream_evaluation_loader(
    cache: TokenCache, streams: Mapping[str, float | StreamConfig], batch_size: int, *, seed: int = 0
) -> Loader[TokenBatch]:
    """Every sample once, in order; its template is the one that the loader's epoch draws."""
    return Loader(StreamBatches(cache, streams, seed=seed), SequentialOrder(len(cache), batch_size, seed))
