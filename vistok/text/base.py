"""The contract of text encoders, which turn texts into a part of a condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from vistok.data.ragged import Piece
from vistok.types import FeatureSpec, IdSpec


class TextError(ValueError):
    """A text encoder is missing, is not the expected one, or cannot be read; or it refuses a text."""


class TextEncoder(ABC):
    """Turns texts into sequences of ids or of features.

    Attributes:
        part: the part of a condition that it gives.
        spec: of the sequences; longer texts are cut to ``spec.length``.
    """

    part: ClassVar[Literal["ids", "features"]]
    spec: IdSpec | FeatureSpec

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Piece]:
        """The sequence of every text, cut to ``spec.length``, with its length before the cut."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids.

        Raises:
            TextError: the encoder gives features, which cannot be turned back into text.
        """
        raise TextError(f"{type(self).__name__} makes features of texts; a text is written by a tokenizer of texts")

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What identifies the encoder, as JSON values: "kind", "name", "length", and a "hash" of all that its sequences
        depend on."""

    @property
    def network(self) -> nn.Module | None:
        """The encoder's network; None for a tokenizer."""
        return None

    def to(self, device: Any) -> TextEncoder:
        """Move the network to a device; returns itself."""
        return self

    def save_files(self, folder: Path) -> bool:
        """Write the encoder's files into ``folder``, if they are to be saved; returns whether they were."""
        return False
