"""Streams of text and image tokens, for models that read and write both in one sequence.

A sample of a token cache becomes a stream by a template: its segments are texts, images and special marks, each in the
loss or not. Streams of a batch are padded on the right, with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.loader import Failures
from vistok.data.tokens import TokenBatch, TokenBatches, TokenCache, TokenCacheError, TokenMixture
from vistok.draws import Keys
from vistok.types import JointVocabulary, TokenKind, TokenSpec

KINDS: tuple[TokenKind, ...] = ("text", "image", "special")
"""What the numbers of ``Streams.kinds`` mean."""


@dataclass(frozen=True)
class Segment:
    """A part of a template.

    Attributes:
        source: where it comes from: ``ids`` (the text), ``tokens`` (the image), ``given`` (an image that comes before),
            or the name of a special mark.
        in_loss: whether a model learns to predict it.
    """

    source: str
    in_loss: bool = False


def _template(text: str) -> tuple[Segment, ...]:
    """Segments from their names; a star puts one into the loss."""
    return tuple(Segment(name.rstrip("*"), name.endswith("*")) for name in text.split())


TEMPLATES: dict[str, tuple[Segment, ...]] = {
    "text_to_image": _template("begin ids begin_image tokens* end_image*"),
    "image_to_text": _template("begin begin_image tokens end_image ids* end*"),
    "edit": _template("begin begin_image given end_image ids begin_image tokens* end_image*"),
}
"""By name; the last has an image and an instruction before the image."""


@dataclass(frozen=True)
class Streams:
    """The streams of a batch.

    Attributes:
        ids: (B, N) int64 of the joint vocabulary; where images are latents, the image id 0.
        kinds: (B, N) int8, see ``KINDS``.
        in_loss: (B, N) bool, True where a model learns to predict the token.
        mask: (B, N) bool, False in the padding at the end.
        latents: (B, N, D) float, zero where no image token is; None where images are ids.
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
            segments: each with its values, (B, n) ids of its own kind or (B, n, D) latents, and what of them is
                valid, (B, n) bool; for a special mark the values are ignored.
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
        """The rows of all, padded to the longest."""
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
    """Joint ids, kinds and membership in the loss, (B, n) each, of a segment."""
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
    """Reads batches of streams from a cache; which template a sample follows is drawn by (seed, epoch, index).

    The ``tokens`` of its batches are :class:`Streams`.

    Args:
        shares: how often each template is drawn, relative to the others.

    Raises:
        ValueError: an unknown template, or a share that is not above 0.
        TokenCacheError: a template that needs texts as ids, or given tokens, and the cache has none.
    """

    def __init__(self, cache: TokenCache | TokenMixture, shares: Mapping[str, float], *, seed: int = 0) -> None:
        unknown = [name for name in shares if name not in TEMPLATES]
        if unknown or not shares or min(shares.values()) <= 0:
            raise ValueError(f"templates are {', '.join(TEMPLATES)}, each with a share above 0; got {dict(shares)}")
        for name in shares:
            needed = {segment.source for segment in TEMPLATES[name]} & {"ids", "given"}
            missing = needed - set(cache.condition_spec.parts)
            if missing:
                raise TokenCacheError(
                    f"the template {name} needs {missing.pop()!r}, which {cache.folder} does not have"
                )
        self._names = tuple(shares)
        self._ends = np.cumsum([shares[name] for name in self._names]) / sum(shares.values())
        self._tokens = TokenBatches(cache, seed=seed)
        self.seed, self.vocabulary = seed, joint_vocabulary(cache)

    def __len__(self) -> int:
        return len(self._tokens)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[TokenBatch, Failures]:
        batch, failures = self._tokens.load(indices, epoch)
        uniforms = Keys.of(self.seed, indices, step=epoch).uniform("templates").double().numpy()
        drawn = np.searchsorted(self._ends[:-1], uniforms, side="right")
        parts, places = [], []
        for number, name in enumerate(self._names):
            rows = torch.from_numpy(np.flatnonzero(drawn == number))
            if len(rows):
                parts.append(self._streams(TEMPLATES[name], batch, rows))
                places.append(rows)
        streams: Any = Streams.cat(parts)[torch.cat(places).argsort()]  # in the place of tokens
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
                part = condition.parts[segment.source]
                values, valid = part.values, part.valid() & ~part.dropped[:, None]  # a missing text is empty
            segments.append((segment, values, valid))
        return Streams.of(segments, self.vocabulary)


def joint_vocabulary(cache: TokenCache | TokenMixture) -> JointVocabulary:
    """The ids of a cache's texts and images, and special marks, in one alphabet."""
    spec, ids = TokenSpec(**cache.spec), cache.condition_spec.ids
    return JointVocabulary(0 if ids is None else ids.vocabulary_size, spec.codebook_size or 1)
