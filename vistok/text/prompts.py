"""The text encoders of a pipeline or of a token cache, and the conditions that they make of texts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from vistok.data.ragged import Piece, pad_left
from vistok.text.base import TextEncoder, TextError
from vistok.text.encoders import CleaningEncoder, CLIPTower, HuggingFaceEncoder
from vistok.text.tokenizers import ByteTokenizer, FileTokenizer
from vistok.types import Condition, ConditionSpec
from vistok.utils.files import atomic_folder, read_object, write_json

TEXT = "text_encoder"
"""Name of the encoders' folder in a token cache or a pipeline."""
RECORD = "text_encoder.json"
LENGTH = 120
"""Default for the most tokens of a text (LlamaGen's)."""
Positions = Literal["text", "all"]
KINDS = {
    "bytes": lambda _, length: ByteTokenizer(length),
    "tokenizers": FileTokenizer,
    "huggingface": HuggingFaceEncoder,
    "clip": CLIPTower,
    "cleaning": CleaningEncoder,
}

log = logging.getLogger(__name__)


def open_text_encoder(
    name: str, length: int = LENGTH, positions: Positions = "text", *, clean: bool = False
) -> TextEncoder:
    """Open a text encoder by its folder or its name on the hub; see :class:`HuggingFaceEncoder`.

    Args:
        length: most tokens of a text.
        positions: "text" gives the states of the text's tokens, "all" those of all positions, for CLIP's text tower
            only (see :class:`CLIPTower`).
        clean: clean texts first, as LlamaGen does (see :class:`CleaningEncoder`).

    Raises:
        TextError: as the encoder.
        ValueError: ``positions`` is unknown, ``length`` is below 1, or ``clean`` is combined with "all".
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions of a text encoder are 'text' or 'all', got {positions!r}")
    if clean and positions == "all":
        raise ValueError("texts are cleaned for T5 and its kin; a tower of CLIP, read at all positions, takes them raw")
    kind = CleaningEncoder if clean else CLIPTower if positions == "all" else HuggingFaceEncoder
    return kind(name, _checked(length))


def open_text_tokenizer(name: str, length: int = LENGTH) -> TextEncoder:
    """Open a text tokenizer.

    Args:
        name: "bytes", a file of the ``tokenizers`` library, or a Hugging Face folder or name.
        length: most tokens of a text.

    Raises:
        TextError: there is no such tokenizer.
        ValueError: ``length`` is below 1.
    """
    return ByteTokenizer(_checked(length)) if name == "bytes" else FileTokenizer(name, _checked(length))


def _checked(length: int) -> int:
    if length < 1:
        raise ValueError(f"texts need a length of at least 1 token, got {length}")
    return length


def copy_encoders(source: Path, target: Path, parts: Sequence[str]) -> None:
    """Copy the saved encoders of these parts from one folder to another, without opening them."""
    present = [part for part in parts if (source / part).is_dir()]
    if present:
        with atomic_folder(target, replace=True) as partial:
            for part in present:
                shutil.copytree(source / part, partial / part)


class PromptEncoder:
    """Turns prompts into conditions by one or several text encoders. A saved encoder is opened at its first use.

    Args:
        encoders: at most one for each part of a condition.

    Raises:
        ValueError: two encoders give the same part.
    """

    def __init__(self, encoders: Sequence[TextEncoder] = ()) -> None:
        self._encoders: dict[str, TextEncoder] = {encoder.part: encoder for encoder in encoders}
        self.identities: dict[str, dict[str, Any]] = {part: e.identity for part, e in self._encoders.items()}
        self._folder = Path()
        self._device: Any = None
        if len(self._encoders) < len(encoders):
            raise ValueError("two text encoders make the same part of a condition")

    @classmethod
    def named(cls, kind: str, name: str, length: int) -> PromptEncoder:
        """A prompt encoder with one text encoder of features, which is opened at its first use.

        Args:
            kind: a key of ``KINDS``.
            name: a local folder, or a name on the hub.
            length: most tokens of a text.
        """
        prompts = cls()
        prompts.identities["features"] = {"kind": kind, "name": name, "length": length, "hash": None}
        return prompts

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a condition that the encoders give; empty without an encoder."""
        return tuple(self.identities)

    @property
    def spec(self) -> ConditionSpec:
        """The spec of the conditions. Opens the encoders."""
        parts: dict[str, Any] = {part: self._encoder(part).spec for part in self.parts}
        return ConditionSpec(**parts)

    def encode(self, texts: Sequence[str], *, refuse_long: bool = False) -> dict[str, list[Piece]]:
        """The sequences of all texts, by the part of the condition; equal texts are encoded once.

        Args:
            refuse_long: whether a text longer than the encoder's length is an error; else it is cut.

        Raises:
            TextError: a text is too long, or is not valid Unicode.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TextError(f"{text!r} is no text: {error.reason} ({error.object[error.start]!r})") from None
        distinct = list(dict.fromkeys(texts))  # names of classes repeat
        sequences = {}
        for part in self.parts:
            found = dict(zip(distinct, self._encoder(part).encode(distinct), strict=True))
            sequences[part] = [found[text] for text in texts]
        for part, pieces in sequences.items() if refuse_long else ():
            length = self._encoder(part).spec.length
            long = [text for text, piece in zip(texts, pieces, strict=True) if piece.length > length]
            if long:
                raise TextError(f"a text of {part} is longer than {length} tokens: {long[0]!r}")
        return sequences

    def condition(self, texts: Sequence[str | None]) -> Condition:
        """The condition of prompts, one per row; None is unconditional. Too long prompts are cut, with a warning."""
        given = [text for text in texts if text is not None]
        conditions = []
        for part, pieces in self.encode(given).items():
            spec = self._encoder(part).spec
            cut = [text for text, piece in zip(given, pieces, strict=True) if piece.length > spec.length]
            if cut:
                what = "a text was" if len(cut) == 1 else f"{len(cut)} texts were"
                log.warning("%s cut to %d tokens: %r", what, spec.length, cut[0][:80])
            rows = iter(piece.values for piece in pieces)
            values, mask = pad_left([None if text is None else next(rows) for text in texts], spec)
            make = Condition.from_ids if part == "ids" else Condition.from_features
            absent = ~mask.any(1)
            mask[absent] = True  # the null condition has its full length
            conditions.append(make(values, mask).drop(absent))
        return Condition.together(*conditions)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, such as those that a model generates.

        Raises:
            TextError: there is no text tokenizer.
        """
        if "ids" not in self.parts:
            raise TextError("this pipeline has no text tokenizer, which would turn what the model writes into text")
        return self._encoder("ids").decode(ids)

    def to(self, device: Any) -> PromptEncoder:
        """Move the encoders, and those that are opened later, to a device; returns itself."""
        self._device = device
        for encoder in self._encoders.values():
            encoder.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the encoders' names and hashes, and the files of local encoders, for ``load``."""
        with atomic_folder(folder, replace=True) as partial:
            for part in self.parts:
                inner, encoder = partial / part, self._encoder(part)
                inner.mkdir()
                write_json(inner / RECORD, encoder.identity | {"carried": encoder.save_files(inner)})

    @classmethod
    def load(cls, folder: Path) -> PromptEncoder:
        """The encoders that ``save`` wrote into a folder, not opened yet; none if there is no folder.

        Raises:
            TextError: a record is damaged.
        """
        saved = cls()
        saved._folder = folder
        for file in sorted(folder.glob(f"*/{RECORD}")):
            try:
                record = read_object(file)
                saved.identities[file.parent.name] = {key: record[key] for key in ("kind", "name", "length", "hash")}
            except (ValueError, KeyError, TypeError) as error:
                raise TextError(f"{file} is damaged ({error!r})") from error
        return saved

    def _encoder(self, part: str) -> TextEncoder:
        if part not in self._encoders:
            self._encoders[part] = self._open(part, self.identities[part])
        return self._encoders[part]

    def _open(self, part: str, identity: Mapping[str, Any]) -> TextEncoder:
        inner = self._folder / part
        if identity["kind"] not in KINDS:
            raise TextError(f"{inner} is of a text encoder of the kind {identity['kind']!r}; known: {', '.join(KINDS)}")
        carried = (inner / RECORD).is_file() and read_object(inner / RECORD).get("carried")
        name = str(inner) if carried else identity["name"]
        encoder = KINDS[identity["kind"]](name, identity["length"])
        if identity["hash"] not in (None, encoder.identity["hash"]):  # None: released weights record no hash
            raise TextError(
                f"{name} is not the text encoder that the generator was trained with: its hash is "
                f"{encoder.identity['hash']}, not {identity['hash']}"
            )
        return encoder if self._device is None else encoder.to(self._device)
