"""Texts that describe images: where each source keeps them, and how they are read.

A folder or .zip has a ``captions.jsonl`` at its top or in a split. Each line is an object with ``file_name`` (relative
to the folder of ``captions.jsonl``) and ``text`` (one text, or a list of several). An image that it does not name may
have a ``.txt`` file of its name beside it. Shards have a ``.txt`` file per sample, or "caption" or "text" in its
``.json`` file. Data sets of the hub have a column of texts. Digits are spelled out.
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
from vistok.data.formats import TEXT, extension, without_extension
from vistok.data.tar import contents, keys_of, open_member
from vistok.utils.files import is_utf8

log = logging.getLogger(__name__)

TEXT_KEYS = ("caption", "text")
"""Keys of a sample's .json file that may hold its text; the first one that is there counts."""
LONGEST = 1 << 20
"""Bytes of a line of captions, or of a sample's file, at most."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Captions = tuple[str, ...]


class Captioned(Protocol):
    """The part of a source of images that captions need."""

    @property
    def classes(self) -> Sequence[str]: ...

    def captions(self, index: int) -> Captions: ...


class CaptionError(ValueError):
    """A file of captions that cannot be read."""


class FolderCaptions:
    """The captions of a folder's images.

    A ``captions.jsonl`` at the top, and the one in ``prefix`` (the folder of a split), are read at once; ``.txt`` files
    when they are asked for.

    Raises:
        CaptionError: a line of ``captions.jsonl`` is no object with ``file_name`` and ``text``, or the file is damaged.
    """

    def __init__(self, tree: FileTree, prefix: str) -> None:
        self._tree = tree
        self._listed = _listed_captions(tree, prefix)
        self._texts = {without_extension(path): path for path in tree.others() if extension(path) == TEXT}

    def of(self, image: str) -> Captions:
        """The captions of the image with this path: those that are listed, else the text beside it.

        Raises:
            CaptionError: the .txt file cannot be read, or is not UTF-8.
        """
        if image in self._listed:
            return self._listed[image]
        path = self._texts.get(without_extension(image))
        if path is None:
            return ()
        where = printable(f"{self._tree.root}/{path}")
        try:
            with self._tree.open(path) as file:
                return texts_of(_read_short(file, where).decode("utf-8-sig"))
        except CaptionError:
            raise
        except (OSError, ValueError, *UNPACKING_ERRORS) as error:
            raise CaptionError(f"{where} holds no caption: {error}") from error


def _listed_captions(tree: FileTree, prefix: str) -> dict[str, Captions]:
    """The captions of ``captions.jsonl`` by the path of the image."""
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
    """One text, several texts or None as a tuple without empty texts.

    Raises:
        TypeError: ``value`` is something else.
        ValueError: a text is not valid Unicode.
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
    """The captions in tar shards. A shard is indexed when its first caption is read."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = shards
        self._places: dict[int, dict[str, tuple[int, int]]] = {}

    def of(self, shard: int, image: str) -> Captions:
        """The captions of the image with this name in a shard: from its .txt file, else from its .json file.

        Raises:
            CaptionError: the .json file is damaged, or a text is not UTF-8.
        """
        path = self._shards[shard]
        for key, kind in itertools.product(keys_of(image), (TEXT, ".json")):
            place = self._index(shard).get(key + kind)
            if place is None:
                continue
            where = f"{path}:{printable(key)}{kind}"
            with open_member(path, *place) as file:
                content = _read_short(file, where)
            try:
                texts = texts_of(content.decode("utf-8-sig") if kind == TEXT else _of_json(content))
            except (ValueError, TypeError, RecursionError) as error:
                raise CaptionError(f"{where} holds no caption: {error}") from error
            if texts:
                return texts
        return ()

    def _index(self, shard: int) -> dict[str, tuple[int, int]]:
        """Offset and size of each .txt and .json file of a shard, by name, with the extension in lower case."""
        if shard not in self._places:
            named = contents(self._shards[shard]).files.items()
            self._places[shard] = {
                without_extension(name) + extension(name): (member.offset_data, member.size)
                for name, member in named
                if extension(name) in (TEXT, ".json")
            }
        return self._places[shard]


def _read_short(file: IO[bytes], where: str) -> bytes:
    """The content of a file of captions; CaptionError if it is longer than any caption."""
    content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise CaptionError(f"{where} has more than {LONGEST:,} bytes; a caption is shorter")
    return content


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
    """The name of a class as texts: each of ImageNet's synonyms ("tench, Tinca tinca") is a text of its own."""
    return tuple(dict.fromkeys(part.strip().replace("_", " ") for part in name.split(",") if part.strip()))


def captions_of(source: Captioned, kind: Literal["own", "class_names"], index: int, label: int) -> Captions:
    """The texts of an image: its ``own`` captions, or the name of its class (none if ``label`` is -1)."""
    if kind == "own":
        return source.captions(index)
    return class_caption(source.classes[label]) if label >= 0 else ()
