"""Texts that describe images: where each source keeps them, and how they are read.

A folder or .zip has ``captions.jsonl``, of the whole or of a split, with an object a line: ``file_name`` (relative to
the file's own folder) and ``text`` (one text, or a list of several). Shards have a ``.txt`` file per sample, or
"caption" or "text" in its ``.json``. Data sets of the hub have a column of texts. Digits are spelled out.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from vistok.data.files import CAPTIONS, UNPACKING_ERRORS, FileTree, printable
from vistok.data.formats import extension
from vistok.data.tar import contents, keys_of, open_member
from vistok.utils.files import is_utf8

log = logging.getLogger(__name__)

TEXT_KEYS = ("caption", "text")
"""Where a sample's .json file has its text."""
LONGEST = 1 << 20
"""Bytes of a line of captions, or of a sample's file, at most."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Captions = tuple[str, ...]


class Captioned(Protocol):
    """A source of images, as far as their texts go."""

    @property
    def classes(self) -> Sequence[str]: ...

    def captions(self, index: int) -> Captions: ...


class CaptionError(ValueError):
    """A file of captions that cannot be read."""


def folder_captions(tree: FileTree, prefix: str) -> dict[str, Captions]:
    """The captions of a folder's images by their paths: of ``captions.jsonl`` in ``prefix`` (a split), or at the top.

    Raises:
        CaptionError: a line that is no object with ``file_name`` and ``text``, or an archive's entry that is damaged.
    """
    captions: dict[str, Captions] = {}
    for folder in dict.fromkeys(("", prefix)):
        if folder + CAPTIONS in tree.others():
            where = f"{tree.root}/{folder}{CAPTIONS}"
            try:
                with tree.open(folder + CAPTIONS) as file:
                    captions |= _read_lines(file, where, folder)
            except (OSError, *UNPACKING_ERRORS) as error:
                raise CaptionError(f"{where} cannot be read: {error}") from error
    absent = captions.keys() - set(tree.images())
    if absent:
        log.warning(
            "%s: captions of %d images that are not there, such as %s", tree.root, len(absent), sorted(absent)[0]
        )
    return captions


def _read_lines(file: IO[bytes], where: str, folder: str) -> dict[str, Captions]:
    captions: dict[str, Captions] = {}
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), 1):
        if len(line) > LONGEST:
            raise CaptionError(f"{where}:{number}: the line has more than {LONGEST:,} bytes; a caption is shorter")
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            path = folder + value["file_name"]
            captions[path] = captions.get(path, ()) + texts_of(value["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CaptionError(
                f'{where}:{number}: expected {{"file_name": "a/b.png", "text": "…"}} or a list of texts ({error!r})'
            ) from error
    return captions


def texts_of(value: Any) -> Captions:
    """One text or several as a tuple, without empty ones; None is none.

    Raises:
        TypeError: something else.
        ValueError: a text that is no Unicode.
    """
    if value is None:
        return ()
    several = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    values = list(value) if several else [value]
    if not all(isinstance(text, str) for text in values):
        raise TypeError(f"a caption is a text or a list of texts, got {value!r}")
    if broken := next((text for text in values if not is_utf8(text)), None):
        raise ValueError(f"a caption is Unicode, got {broken!r}")
    return tuple(text.strip() for text in values if text.strip())


class ShardCaptions:
    """The captions in tar shards, which are walked through when a shard's first caption is asked for."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = shards
        self._places: dict[int, dict[str, tuple[int, int]]] = {}

    def of(self, shard: int, image: str) -> Captions:
        """The captions of the image of this name in a shard: its .txt file, else what its .json file says.

        Raises:
            CaptionError: a damaged .json file, or a text that is not UTF-8.
        """
        path = self._shards[shard]
        for key, kind in itertools.product(keys_of(image), (".txt", ".json")):
            place = self._index(shard).get(key + kind)
            if place is None:
                continue
            with open_member(path, *place) as file:
                content = file.read(LONGEST + 1)
            if len(content) > LONGEST:
                raise CaptionError(
                    f"{path}:{printable(key)}{kind} has more than {LONGEST:,} bytes; a caption is shorter"
                )
            try:
                texts = texts_of(content.decode("utf-8-sig") if kind == ".txt" else _of_json(content))
            except (ValueError, TypeError, RecursionError) as error:
                raise CaptionError(f"{path}:{printable(key)}{kind} holds no caption: {error}") from error
            if texts:
                return texts
        return ()

    def _index(self, shard: int) -> dict[str, tuple[int, int]]:
        """Offset and size of the .txt and .json files of a shard, by their names."""
        if shard not in self._places:
            named = contents(self._shards[shard]).files.items()
            self._places[shard] = {
                name[: -len(extension(name))] + extension(name): (member.offset_data, member.size)
                for name, member in named
                if extension(name) in (".txt", ".json")
            }
        return self._places[shard]


def _of_json(content: bytes) -> Any:
    value = json.loads(content)
    if not isinstance(value, dict):
        return None
    return next((value[key] for key in TEXT_KEYS if value.get(key) is not None), None)


def spell_digit(digit: int, how: str = "") -> Captions:
    """A digit in words: "a seven" and "seven", or "a seven, turned left" and "seven, turned left"."""
    word = NUMBERS[digit]
    article = "an" if word == "eight" else "a"
    return tuple(f"{text}, {how}" if how else text for text in (f"{article} {word}", word))


def class_caption(name: str) -> Captions:
    """A class's name as a text; of ImageNet's synonyms ("tench, Tinca tinca") each is one."""
    return tuple(dict.fromkeys(part.strip().replace("_", " ") for part in name.split(",") if part.strip()))


def captions_of(source: Captioned, kind: Literal["own", "class_names"], index: int, label: int) -> Captions:
    """The texts of an image with a label: its ``own`` captions, or its class's name."""
    if kind == "own":
        return source.captions(index)
    return class_caption(source.classes[label]) if label >= 0 else ()
