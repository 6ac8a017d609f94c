"""The texts of images as what models read of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vistok.data.batches import ImageBatch
from vistok.data.captions import captions_of
from vistok.data.loader import Source
from vistok.data.ragged import Piece
from vistok.text import PromptEncoder
from vistok.types import Condition


@dataclass(frozen=True)
class CaptionReader:
    """The captions of a source as sequences for a cache.

    Attributes:
        kind: ``own`` captions, or ``class_names``.
        text: what turns them into sequences.
        refuse_long: whether one that is too long is an error.
    """

    source: Source
    kind: Literal["own", "class_names"]
    text: PromptEncoder
    refuse_long: bool

    def of(self, batch: ImageBatch) -> dict[str, Sequence[Sequence[Piece]]]:
        """The sequences of each image, by the part of the condition that they belong to."""
        if not self.text.parts:
            return {}
        texts = [self.texts(index, label) for index, label in zip(batch.indices.tolist(), batch.labels.tolist())]
        flat = [text for several in texts for text in several]
        parts = self.text.encode(flat, refuse_long=self.refuse_long)
        sequences: dict[str, Sequence[Sequence[Piece]]] = {}
        for part, pieces in parts.items():
            rest = iter(pieces)
            sequences[part] = [list(itertools.islice(rest, len(several))) for several in texts]
        return sequences

    def texts(self, index: int, label: int) -> Sequence[str]:
        """The captions of an image with a label."""
        return captions_of(self.source, self.kind, index, label)

    def condition(self, batch: ImageBatch, choices: Tensor) -> Condition:
        """The condition of one caption of each image, on the CPU; images without one are unconditional.

        Args:
            choices: (B,) uniform numbers that say which of several.
        """
        chosen: list[str | None] = []
        for index, label, choice in zip(batch.indices.tolist(), batch.labels.tolist(), choices.tolist(), strict=True):
            texts = self.texts(index, label)
            chosen.append(texts[int(choice * len(texts))] if texts else None)
        return self.text.condition(chosen)
