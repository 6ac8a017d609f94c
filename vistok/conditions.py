"""Conditions of a model as named parts: the spec of a model or of data, and the values of a batch.

The parts are ``labels`` (a class), ``ids`` and ``features`` (a text as ids or as the states of a text encoder) and
``given`` (preceding tokens: of frames or another image). A condition has any subset of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PARTS = ("labels", "ids", "features", "given")
"""The names of the parts, in their order."""


@dataclass(frozen=True)
class IdSpec:
    """A sequence of ids.

    Attributes:
        vocabulary_size: ids are 0 .. vocabulary_size - 1.
        length: the most ids of a sample; shorter ones are padded on the left, with a mask.
    """

    vocabulary_size: int
    length: int


@dataclass(frozen=True)
class FeatureSpec:
    """A sequence of feature vectors.

    Attributes:
        dim: channels of a vector.
        length: the most vectors of a sample; shorter ones are padded on the left, with a mask.
    """

    dim: int
    length: int


@dataclass(frozen=True)
class ConditionSpec:
    """The parts of the conditions that a model takes, or that a data set has.

    Attributes:
        num_classes: class labels are 0 .. num_classes - 1; 0 means no labels.
        ids: a text as ids.
        features: a text as the states of a text encoder.
        given: tokens that precede the modelled ones: ids or latents.
    """

    num_classes: int = 0
    ids: IdSpec | None = None
    features: FeatureSpec | None = None
    given: IdSpec | FeatureSpec | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "features", "given"):  # a spec read from JSON holds dicts
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, FeatureSpec(**value) if "dim" in value else IdSpec(**value))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the spec's parts."""
        return tuple(name for name in PARTS if (self.num_classes if name == "labels" else getattr(self, name)))

    def only(self, parts: Iterable[str]) -> ConditionSpec:
        """The spec with only the named parts."""
        parts = _check_names(parts)
        return ConditionSpec(
            self.num_classes if "labels" in parts else 0,
            **{name: getattr(self, name) for name in PARTS[1:] if name in parts},
        )

    def describe(self) -> str:
        """The spec in words, such as "class labels" or "text features (B, 120, 2048)"."""
        words = []
        for name in self.parts:
            part = getattr(self, name, None)
            size = f" (B, {part.length}, {part.dim})" if isinstance(part, FeatureSpec) else ""
            size = f" (B, {part.length}) below {part.vocabulary_size}" if isinstance(part, IdSpec) else size
            words.append(WORDS[name] + size)
        return " and ".join(words) or "no condition"

    def check(self, condition: Condition, taker: str = "this generator") -> Condition:
        """Return ``condition`` if its parts fit; values of dropped rows are ignored. Messages name the ``taker``.

        The range check makes the host wait for the values, so call it where conditions enter, not in a loop.

        Raises:
            ValueError: a part is not in the spec, has another shape, or has a value out of range.
        """
        for name, part in condition.parts.items():
            if name not in self.parts:
                if not self.parts:
                    raise ValueError(f"{taker} takes no {WORDS[name]}; generate unconditionally")
                raise ValueError(f"{taker} takes {self.describe()}, not {WORDS[name]}")
            kind = IdSpec(self.num_classes, 1) if name == "labels" else getattr(self, name)
            if name != "labels":
                _check_shape(WORDS[name], part, kind)
            if isinstance(kind, IdSpec):
                word = {"labels": "class label", "ids": "condition id"}.get(name, "id of a given token")
                _check_range(word, part.values[~part.dropped], kind.vocabulary_size, taker)
        return condition


WORDS = {"labels": "class labels", "ids": "condition ids", "features": "text features", "given": "given tokens"}
"""The names of the parts in messages."""


@dataclass(frozen=True)
class ConditionPart:
    """One part of the condition of a batch.

    Attributes:
        values: (B,) int64 labels, (B, T) int64 ids, or (B, T, D) float features or latents.
        dropped: (B,) bool, True for rows without this part, in which the model uses its null embedding.
        mask: (B, T) bool, True where a position is valid, or None (all valid).
        instead: a part that replaces rows when they are dropped later (a negative prompt), or None.
    """

    values: Tensor
    dropped: Tensor
    mask: Tensor | None = None
    instead: ConditionPart | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ConditionPart:
        """The part with the function applied to all its tensors."""
        return ConditionPart(
            function(self.values),
            function(self.dropped),
            None if self.mask is None else function(self.mask),
            None if self.instead is None else self.instead.map(function),
        )

    def valid(self) -> Tensor:
        """(B, T) bool: the mask, or all True."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.values.shape[:2], dtype=torch.bool, device=self.values.device)

    def drop(self, rows: Tensor) -> ConditionPart:
        """The part with the rows of the (B,) bool mask dropped, or replaced if there is a part ``instead``."""
        if self.instead is None:
            return replace(self, dropped=self.dropped | rows)
        other, wide = self.instead, rows.view(-1, *[1] * (self.values.ndim - 1))
        mask = None
        if self.mask is not None or other.mask is not None:
            mask = torch.where(rows[:, None], other.valid(), self.valid())
        values = torch.where(wide, other.values.to(self.values.dtype), self.values)
        return ConditionPart(values, torch.where(rows, other.dropped, self.dropped), mask)


@dataclass(frozen=True)
class Condition:
    """The condition of a batch: named parts, each with the rows in which it is dropped.

    A row without any part is unconditional. Training drops parts at random; guidance makes one batch of rows in which
    different parts are dropped.

    Attributes:
        size: number of rows B.
        parts: the parts by name, see ``PARTS``.
        device: where the tensors are.
    """

    size: int
    parts: Mapping[str, ConditionPart] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        _check_names(self.parts)
        object.__setattr__(self, "parts", {name: self.parts[name] for name in PARTS if name in self.parts})
        for name, part in self.parts.items():
            if len(part.values) != self.size or part.dropped.shape != (self.size,):
                raise ValueError(f"a condition of {self.size} rows cannot have {len(part.values)} {WORDS[name]}")

    @classmethod
    def none(cls, batch_size: int, device: torch.device | str = "cpu") -> Condition:
        """The condition of unconditional generation."""
        return cls(batch_size, device=device)

    @classmethod
    def from_labels(cls, labels: Tensor | Sequence[int]) -> Condition:
        """Class labels (B,); a negative label is unconditional."""
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be (B,) integers, got shape {tuple(labels.shape)} of {labels.dtype}")
        return cls._of("labels", ConditionPart(labels.long(), labels < 0))

    @classmethod
    def from_ids(cls, ids: Tensor, mask: Tensor | None = None) -> Condition:
        """Condition tokens (B, T), with an optional (B, T) mask of the valid positions."""
        return cls._of("ids", _sequence("condition ids", ids, mask, ndim=2))

    @classmethod
    def from_features(cls, features: Tensor, mask: Tensor | None = None) -> Condition:
        """Feature sequences (B, T, D), with an optional (B, T) mask of the valid positions."""
        return cls._of("features", _sequence("features", features, mask, ndim=3))

    @classmethod
    def from_given(cls, tokens: Tensor, mask: Tensor | None = None) -> Condition:
        """Preceding tokens: ids (B, T) or latents (B, T, D), with an optional (B, T) mask of the valid positions."""
        return cls._of("given", _sequence("given tokens", tokens, mask, ndim=3 if tokens.is_floating_point() else 2))

    @classmethod
    def _of(cls, name: str, part: ConditionPart) -> Condition:
        return cls(len(part.dropped), {name: part}, part.values.device)

    @classmethod
    def together(cls, *conditions: Condition) -> Condition:
        """Combine the parts of several conditions of the same rows; each has different parts.

        Raises:
            ValueError: there is no condition, two have the same part, or their numbers of rows differ.
        """
        names = [name for condition in conditions for name in condition.parts]
        if not conditions or len(set(names)) < len(names):
            raise ValueError(f"conditions that go together have different parts, got {names}")
        parts = {name: part for condition in conditions for name, part in condition.parts.items()}
        return cls(conditions[0].size, parts, conditions[0].device)

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """Concatenate the rows of conditions with the same parts, for example those of guidance.

        Raises:
            ValueError: conditions have different parts.
        """
        first = conditions[0]
        if any(other.parts.keys() != first.parts.keys() for other in conditions):
            raise ValueError(f"rows of one batch have the same parts, got {[list(c.parts) for c in conditions]}")
        parts = {name: _cat([condition.parts[name] for condition in conditions]) for name in first.parts}
        return cls(sum(map(len, conditions)), parts, first.device)

    def __len__(self) -> int:
        return self.size

    def part(self, name: str) -> ConditionPart | None:
        """The part of this name, or None."""
        _check_names([name])
        return self.parts.get(name)

    def _values(self, name: str) -> Tensor | None:
        return self.parts[name].values if name in self.parts else None

    @property
    def labels(self) -> Tensor | None:
        """(B,) int64 class ids, or None."""
        return self._values("labels")

    @property
    def ids(self) -> Tensor | None:
        """(B, T) int64 condition tokens (text, a segmentation map's tokens), or None."""
        return self._values("ids")

    @property
    def features(self) -> Tensor | None:
        """(B, T, D) float text-encoder states, or None."""
        return self._values("features")

    @property
    def given(self) -> Tensor | None:
        """(B, T) int64 ids or (B, T, D) float latents of preceding tokens, or None."""
        return self._values("given")

    @property
    def mask(self) -> Tensor | None:
        """(B, T) bool, True where a text feature is valid, or None (all valid)."""
        return self.parts["features"].mask if "features" in self.parts else None

    @property
    def dropped(self) -> Tensor:
        """(B,) bool, True for unconditional rows, in which every part is dropped."""
        return self.dropped_of(*self.parts)

    def dropped_of(self, *names: str) -> Tensor:
        """(B,) bool, True for the rows without any of the named parts."""
        _check_names(names)
        dropped = torch.ones(self.size, dtype=torch.bool, device=self.device)
        for name in names:
            if name in self.parts:
                dropped = dropped & self.parts[name].dropped
        return dropped

    def _map(self, function: Callable[[Tensor], Tensor]) -> dict[str, ConditionPart]:
        return {name: part.map(function) for name, part in self.parts.items()}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Condition:
        parts = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(self, parts=parts, device=device)

    def pin_memory(self) -> Condition:
        return replace(self, parts=self._map(Tensor.pin_memory))

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """The rows of a slice, of int64 positions, or of a bool mask."""
        parts = self._map(lambda tensor: tensor[rows])
        size = len(next(iter(parts.values())).dropped if parts else torch.empty(self.size, device=self.device)[rows])
        return replace(self, size=size, parts=parts)

    def without(self, parts: Iterable[str] | None = None, rows: Tensor | None = None) -> Condition:
        """The same condition with the named parts dropped (None is all), in all rows or in those of the (B,) bool mask.

        Named parts that the condition does not have are ignored.

        Raises:
            ValueError: a name is not in ``PARTS``.
        """
        parts = PARTS if parts is None else _check_names(parts)
        if rows is None:
            rows = torch.ones(self.size, dtype=torch.bool, device=self.device)
        changed = {name: part.drop(rows) if name in parts else part for name, part in self.parts.items()}
        return replace(self, parts=changed)

    def instead(self, other: Condition) -> Condition:
        """The same condition, whose parts are replaced by those of ``other`` when they are dropped. Guidance then leads
        away from ``other`` (a negative prompt) instead of the unconditional prediction.

        Raises:
            ValueError: ``other`` has another number of rows, or a part that this condition does not have.
        """
        if len(other) != self.size or not other.parts.keys() <= self.parts.keys():
            raise ValueError(f"{list(other.parts)} of {len(other)} rows cannot stand in for {list(self.parts)}")
        parts = {name: replace(part, instead=other.parts.get(name)) for name, part in self.parts.items()}
        return replace(self, parts=parts)

    def only(self, parts: Iterable[str]) -> Condition:
        """The condition with only the named parts, if it has them."""
        parts = _check_names(parts)
        return replace(self, parts={name: part for name, part in self.parts.items() if name in parts})

    def drop(self, rows: Tensor) -> Condition:
        """The same condition, with the rows of the (B,) bool mask made unconditional as well."""
        return self.without(PARTS, rows)

    def null(self) -> Condition:
        """The same condition with all parts dropped. Masks stay, so that conditional and null rows have one length."""
        return self.without()


def _cat(parts: Sequence[ConditionPart]) -> ConditionPart:
    """Concatenate the rows of several parts; a part without a mask is valid everywhere."""
    masked = any(part.mask is not None for part in parts)
    mask = torch.cat([part.valid() for part in parts]) if masked else None
    return ConditionPart(torch.cat([p.values for p in parts]), torch.cat([p.dropped for p in parts]), mask)


def _sequence(what: str, values: Tensor, mask: Tensor | None, ndim: int) -> ConditionPart:
    """A part of a sequence whose shape and mask are checked."""
    if values.ndim != ndim or values.is_floating_point() != (ndim == 3):
        shape = "(B, T, D)" if ndim == 3 else "(B, T) integers"
        raise ValueError(f"{what} must be {shape}, got shape {tuple(values.shape)} of {values.dtype}")
    if mask is not None and mask.shape != values.shape[:2]:
        raise ValueError(f"mask must be {tuple(values.shape[:2])}, got shape {tuple(mask.shape)}")
    dropped = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    return ConditionPart(values if ndim == 3 else values.long(), dropped, None if mask is None else mask.bool())


def _check_names(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no part of a condition; there are {', '.join(PARTS)}")
    return names


def _check_shape(what: str, part: ConditionPart, kind: IdSpec | FeatureSpec) -> None:
    expected = (kind.length, kind.dim) if isinstance(kind, FeatureSpec) else (kind.length,)
    if tuple(part.values.shape[1:]) != expected:
        raise ValueError(
            f"{what} must be (B, {', '.join(map(str, expected))}), padded on the left, got {tuple(part.values.shape)}"
        )


def _check_range(what: str, values: Tensor, count: int, taker: str) -> None:
    if not values.numel():
        return
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if low < 0 or high >= count:
        known = "classes" if what == "class label" else "ids"
        raise ValueError(f"{what} {low if low < 0 else high} is out of range: {taker} knows {known} 0..{count - 1}")
