"""The captions of images, encoded for models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """Encodes the captions of a source, as sequences for a token cache or as conditions.

    Attributes:
        source: the images.
        kind: the source's ``own`` captions, or its ``class_names``.
        text: encodes the captions.
        refuse_long: whether ``of`` raises an error for a caption that is too long.
    """

    source: Source
    kind: Literal["own", "class_names"]
    text: PromptEncoder
    refuse_long: bool = field(kw_only=True)

    def of(self, batch: ImageBatch) -> dict[str, Sequence[Sequence[Piece]]]:
        """The sequences of each image's captions, by the part of the condition that they belong to."""
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
        """The captions of the image with this index and label."""
        return captions_of(self.source, self.kind, index, label)

    def condition(self, batch: ImageBatch, choices: Tensor) -> Condition:
        """The condition from one caption per image, on the CPU; images without captions are unconditional.

        Args:
            choices: (B,) numbers, uniform in [0, 1), which choose among the captions of each image.
        """
        chosen: list[str | None] = []
        for index, label, choice in zip(batch.indices.tolist(), batch.labels.tolist(), choices.tolist(), strict=True):
            texts = self.texts(index, label)
            chosen.append(texts[int(choice * len(texts))] if texts else None)
        return self.text.condition(chosen)
