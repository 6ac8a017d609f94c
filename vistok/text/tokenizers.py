"""Text tokenizers: bytes, a file of the ``tokenizers`` library, or a Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vistok.data.ragged import Piece
from vistok.text.base import TextEncoder, TextError
from vistok.types import IdSpec

TOKENIZER_FILE = "tokenizer.json"


class IdEncoder(TextEncoder, ABC):
    """A text encoder that gives ids."""

    part = "ids"
    spec: IdSpec

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """All ids of a text, not cut."""

    def encode(self, texts: Sequence[str]) -> list[Piece]:
        ids = [np.asarray(self.ids(text), np.int64) for text in texts]
        return [Piece(values[: self.spec.length], len(values)) for values in ids]


class ByteTokenizer(IdEncoder):
    """A text as its UTF-8 bytes: 256 ids. It needs no package and no download."""

    kind = "bytes"

    def __init__(self, length: int) -> None:
        self.spec = IdSpec(256, length)

    def ids(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.kind, "length": self.spec.length, "hash": self.kind}


class FileTokenizer(IdEncoder):
    """A tokenizer of the ``tokenizers`` library, from a JSON file or from a Hugging Face folder or name.

    Raises:
        TextError: the library is not installed, or the file cannot be read.
    """

    kind = "tokenizers"

    def __init__(self, name: str, length: int) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise TextError("text tokenizers need `tokenizers`; pip install 'vistok[text]'") from error
        try:
            path = Path(name) / TOKENIZER_FILE if Path(name).is_dir() else Path(name)
            if path.is_file():
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            else:
                self._tokenizer = tokenizers.Tokenizer.from_pretrained(name)
        except Exception as error:  # the library raises bare exceptions
            raise TextError(
                f"{name} is no text tokenizer: neither a {TOKENIZER_FILE}, a folder that has one, nor a name on the "
                f"hub ({error})"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._name = name
        self.spec = IdSpec(self._tokenizer.get_vocab_size(), length)

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()
        return {"kind": self.kind, "name": self._name, "length": self.spec.length, "hash": digest}

    def save_files(self, folder: Path) -> bool:
        self._tokenizer.save(str(folder / TOKENIZER_FILE))
        return True
