"""The contract of what turns texts into a part of a condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from vistok.data.ragged import Piece
from vistok.types import FeatureSpec, IdSpec


class TextError(ValueError):
    """A text encoder that is not there, is another one, or cannot be read."""


class TextEncoder(ABC):
    """Turns texts into sequences of ids or of features.

    Attributes:
        part: which part of a condition it makes.
        spec: of the sequences; longer ones are cut to its length.
    """

    part: ClassVar[Literal["ids", "features"]]
    spec: IdSpec | FeatureSpec

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Piece]:
        """The sequence of every text, at most ``spec.length`` long, with the length that it would have uncut."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids.

        Raises:
            TextError: it makes features, of which there is no way back.
        """
        raise TextError(f"{type(self).__name__} makes features of texts; a text is written by a tokenizer of texts")

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What it is, as JSON values: "kind", "name", "length", and a "hash" of all that its answers depend on."""

    @property
    def network(self) -> nn.Module | None:
        """What it computes with, if it is a network."""
        return None

    def to(self, device: Any) -> TextEncoder:
        """Move what it computes with; returns itself."""
        return self

    def save_files(self, folder: Path) -> bool:
        """Write its files into ``folder``, if it has some to carry along; whether it did."""
        return False
