"""The inputs of Ming-UniVision: prompts, and growing sequences with their KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vistok.generators.engine.cache import KVCache
from vistok.generators.ming_univision.language_model import LanguageModel
from vistok.generators.ming_univision.networks import Backbone, FlowHead
from vistok.nn.masks import visible_causal_mask
from vistok.types import Condition, Expands, TokenSpec

ALWAYS, TEXT, IMAGE = 0, 1, 2
"""Kinds of entries: those that every row of guidance sees, the user's text, and earlier images."""
KINDS = {"labels": TEXT, "ids": TEXT, "given": IMAGE}
"""The kind of entries that are hidden from a row that drops a part of the condition."""


@dataclass(frozen=True)
class Prompt:
    """The entries before a generated image or text.

    Attributes:
        embeddings: (B, n, D).
        valid: (B, n) bool, False in padding.
        kinds: (B, n) int64, see ``ALWAYS``.
        images: (B, n) bool, True at the features of an image.
    """

    embeddings: Tensor
    valid: Tensor
    kinds: Tensor
    images: Tensor

    @classmethod
    def cat(cls, parts: list[Prompt]) -> Prompt:
        """Concatenate several prompts."""
        names = ("embeddings", "valid", "kinds", "images")
        return cls(*(torch.cat([getattr(part, name) for part in parts], 1) for name in names))

    def trimmed(self) -> Prompt:
        """The prompt without the entries that are padding in all rows."""
        kept = self.valid.any(0)
        return Prompt(self.embeddings[:, kept], self.valid[:, kept], self.kinds[:, kept], self.images[:, kept])


class MingLike(Protocol):
    """What a session needs of MingUniVision; see there."""

    spec: TokenSpec
    image_start: int
    image_end: int
    end: int | None
    backbone: Backbone | LanguageModel
    flow_head: FlowHead
    embedding: nn.Embedding
    to_condition: nn.Module
    projection: nn.Module
    output: nn.Linear

    def check_condition(self, condition: Condition) -> None: ...

    def check_null(self) -> None: ...

    def check_ids(self, ids: Tensor) -> None: ...

    def embed_special(self, token: int, rows: int) -> Tensor: ...

    def prompt(self, condition: Condition, tokenizer: Expands | None) -> Prompt: ...


class Context:
    """A batch of growing sequences with their cache. An entry sees the earlier ones that its row does not hide.

    Attributes:
        rows: the number of sequences, without the branches of guidance.
        visible: (rows, length) bool, the entries that later ones see.
        kinds: (rows, length) int64, see ``ALWAYS``.
    """

    def __init__(self, model: MingLike, rows: int, length: int):
        weight = model.output.weight
        layers, heads, head_dim = model.backbone.cache_sizes
        self.model, self.rows = model, rows
        self.cache = KVCache(layers, rows, heads, length, head_dim, dtype=weight.dtype, device=weight.device)
        self.visible = torch.zeros(rows, 0, dtype=torch.bool, device=weight.device)
        self.kinds = torch.zeros(rows, 0, dtype=torch.int64, device=weight.device)

    def __len__(self) -> int:
        """The number of entries of each sequence."""
        return self.visible.shape[1]

    def check_room(self, count: int, what: str = "entries") -> None:
        """Raise ValueError unless ``count`` more entries fit."""
        limit = self.model.backbone.max_length
        if len(self) + count > limit:
            raise ValueError(
                f"the context has {len(self)} entries, and {count} more {what} exceed the {limit} that this model is "
                "built for; begin a new one, ask for less, or build the model with a larger max_length"
            )

    def read(
        self, x: Tensor, valid: Tensor | None = None, kinds: Tensor | None = None, images: Tensor | None = None
    ) -> Tensor:
        """Append entries (R, n, D); return their normed hidden states (R, n, D).

        Raises:
            ValueError: the context would be longer than the model's ``max_length``.
        """
        rows, count = x.shape[:2]
        start = len(self)
        self.check_room(count)
        if valid is None:
            valid = torch.ones(rows, count, dtype=torch.bool, device=x.device)
        if kinds is None:
            kinds = torch.full_like(valid, ALWAYS, dtype=torch.int64)
        self.cache.reserve(start + count)
        self.visible, self.kinds = torch.cat([self.visible, valid], 1), torch.cat([self.kinds, kinds], 1)
        positions = (self.visible.cumsum(1)[:, start:] - 1).clamp_min(0)
        return self.model.backbone(x, positions, visible_causal_mask(self.visible, start), self.cache.layers, images)

    def branch(self, hidden: list[Tensor]) -> None:
        """Repeat all sequences, one branch for each of ``hidden`` (rows, length) bool, the entries that it hides."""
        chosen = torch.arange(self.rows, device=self.visible.device).repeat(len(hidden))
        self.cache.choose(chosen)
        self.visible = self.visible[chosen] & ~torch.cat(hidden)
        self.kinds = self.kinds[chosen]

    def join(self, visible: Tensor) -> None:
        """Keep only the first branch, and reset the visibility of its first n entries to ``visible`` (rows, n)."""
        first = torch.arange(self.rows, device=self.visible.device)
        self.cache.choose(first)
        self.visible = torch.cat([visible, self.visible[: self.rows, visible.shape[1] :]], 1)
        self.kinds = self.kinds[: self.rows]
