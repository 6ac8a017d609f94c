"""Images in webdataset shards: .tar files in which the files of one sample share their name up to the extension.

Shards are indexed once and then read at random, so that batches, their order and resuming are those of any other
source: exact, and the same for any number of workers. Remote shards are fetched whole, once.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vistok.config import ShellCommand
from vistok.data.files import IMAGE_EXTENSIONS
from vistok.data.remote import Shard, check_address, fetch, is_remote
from vistok.data.sources import DECODING_ERRORS, UNCONDITIONAL, ImageSource, UnreadableImageError, convert, hash_lines
from vistok.data.tar import regular_files
from vistok.utils.files import atomic_file, cache_folder, read_json

log = logging.getLogger(__name__)

CLASS_NAMES = "classnames.txt"
INDEX_VERSION = 2
MOST_SHARDS = 100_000


class Sample(NamedTuple):
    """Where an image lies.

    Attributes:
        shard: number of the shard.
        offset, size: of the image's bytes in it.
        name: the sample's name with the image's extension.
        label: class id, or -1.
    """

    shard: int
    offset: int
    size: int
    name: str
    label: int


class ShardSource(ImageSource):
    """Images of webdataset shards.

    The label of an image is the integer in its ``.cls`` file, else "label" of its ``.json``; without either the source
    is unconditional. Class names are the lines of ``classnames.txt`` beside local shards, else the ids as text.

    Args:
        pattern: a path or URL; ``{0000..0252}`` counts, a path may have wildcards, and ``{split}`` is the split.
            URLs (``https://``, ``s3://``, ...; see :mod:`vistok.data.remote`) are fetched into ``cache``.
        cache: where fetched shards and the indices of all shards are kept.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: a shard that is damaged or no tar file, a label that is no integer, labels for some images only, or
            a split that ``pattern`` does not name.
        ConfigError: a URL, and what reads it is not installed.
    """

    def __init__(
        self, pattern: Shard, *, split: str | None = "train", channels: int = 3, cache: Path | None = None
    ) -> None:
        if "{split}" not in str(pattern) and split not in (None, "train"):
            raise ValueError(f"data.root={pattern} names no split; write {{split}} where {split!r} belongs, or both")
        urls = shard_paths(_with_text(pattern, lambda text: text.replace("{split}", split or "")))
        cache = cache or cache_folder("shards")
        self._paths = fetch(urls, cache) if is_remote(pattern) else [Path(str(url)) for url in urls]
        self._samples = [s for number, path in enumerate(self._paths) for s in samples_of(path, number, cache)]
        self._channels = channels
        if not self._samples:
            raise FileNotFoundError(
                f"no images in the {len(urls)} shards of {pattern}; of {' '.join(IMAGE_EXTENSIONS)}"
            )
        self.classes = self._name_classes(pattern)

    def _name_classes(self, pattern: Shard) -> tuple[str, ...]:
        unlabelled = [sample for sample in self._samples if sample.label == UNCONDITIONAL]
        if len(unlabelled) == len(self._samples):
            log.info('the images of %s have no labels, in .cls files or as "label" in .json files', pattern)
            return ()
        if unlabelled:
            raise ValueError(f"{len(unlabelled)} images of {pattern} have no label (such as {unlabelled[0].name})")
        count = 1 + max(sample.label for sample in self._samples)
        names = self._paths[0].with_name(CLASS_NAMES)
        if not names.exists():
            return tuple(map(str, range(count)))
        lines = tuple(names.read_text().splitlines())
        if len(lines) < count:
            raise ValueError(f"{names} names {len(lines)} classes, but there is a label {count - 1}")
        return lines

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        sample = self._samples[index]
        try:
            with self._paths[sample.shard].open("rb") as file:
                file.seek(sample.offset)
                content = file.read(sample.size)
            with Image.open(io.BytesIO(content)) as image:
                return convert(image, self._channels), sample.label
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error)) from error

    def name(self, index: int) -> str:
        sample = self._samples[index]
        return f"{self._paths[sample.shard]}:{sample.name}"

    def fingerprint(self) -> str:
        return hash_lines(f"{sample.name} {sample.size}" for sample in self._samples)


def shard_paths(pattern: Shard) -> list[Shard]:
    """The shards that a pattern stands for, in order.

    Raises:
        FileNotFoundError: a local path or wildcard with nothing there.
        ValueError: more than ``MOST_SHARDS``, or an address that is not fetched.
    """
    paths: list[Shard] = []
    text = pattern.command if isinstance(pattern, ShellCommand) else pattern
    expanded = list(itertools.islice(expand_braces(text), MOST_SHARDS + 1))
    if len(expanded) > MOST_SHARDS:
        raise ValueError(f"data.root={pattern} stands for more than {MOST_SHARDS:,} shards; is a number mistyped?")
    for part in expanded:
        path = _with_text(pattern, lambda _, part=part: part)
        if is_remote(path):
            check_address(path)
        found = [path] if is_remote(path) else sorted(glob.glob(os.path.expanduser(part)))
        if not found:
            raise FileNotFoundError(f"no such shard: {path} (of data.root={pattern})")
        paths += found
    return paths


def _with_text(pattern: Shard, change: Callable[[str], str]) -> Shard:
    """The pattern, or the command, with its text changed."""
    return ShellCommand(change(pattern.command)) if isinstance(pattern, ShellCommand) else change(pattern)


def expand_braces(pattern: str) -> Iterator[str]:
    """``a-{00..02}.tar`` to a-00.tar, a-01.tar, a-02.tar; several pairs of braces multiply."""
    match = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from expand_braces(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def samples_of(path: Path, number: int, cache: Path) -> list[Sample]:
    """As ``index_shard``; what it finds is kept in ``cache``, because a large set takes minutes to walk through."""
    status = path.stat()
    # A shard that has changed is indexed anew, and all are if the rules of indexing have.
    key = f"{INDEX_VERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    file = cache / "index" / f"{hash_lines([key])[:32]}.json"
    try:
        return [Sample(number, *row) for row in read_json(file)]
    except (OSError, ValueError, TypeError):
        samples = list(index_shard(path, number))
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps([sample[1:] for sample in samples]))
    except OSError as error:
        log.info("the index of %s is not kept: %s", path, error)
    return samples


def index_shard(path: Path, number: int) -> Iterator[Sample]:
    """The images of a tar file, with their labels, in their order there.

    Raises:
        ValueError: it is cut, damaged or no tar file, or a label is no class id.
    """
    try:
        members = regular_files(path)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole, uncompressed .tar file ({error}); fetch or make it again") from error
    labels = _labels(path, members)
    for member in members:
        stem, extension = _split(member.name)
        if extension in IMAGE_EXTENSIONS:
            yield Sample(number, member.offset_data, member.size, member.name, labels.get(stem, UNCONDITIONAL))


def _labels(path: Path, members: Sequence[tarfile.TarInfo]) -> dict[str, int]:
    """Class ids by sample: that of its .cls file, else that of its .json file, if it has one."""
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for kind in (".cls", ".json"):
            for member in members:
                stem, extension = _split(member.name)
                if extension != kind or stem in labels:
                    continue
                file.seek(member.offset_data)
                try:
                    label = _label(file.read(member.size), kind)
                except ValueError as error:
                    raise ValueError(f"{path}:{member.name} holds no class id: {error}") from error
                if label is not None:
                    labels[stem] = label
    return labels


def _label(content: bytes, kind: str) -> int | None:
    """The class id that a file holds; None if it is a .json file without "label", or with null there.

    Raises:
        ValueError: something else than an integer from 0, or -1 for no class.
    """
    label = content
    if kind == ".json":
        value = json.loads(content)
        label = value.get("label") if isinstance(value, dict) else None
    if label is None:
        return None
    if not isinstance(label, int | str | bytes) or isinstance(label, bool) or int(label) < UNCONDITIONAL:
        raise ValueError(f"expected an integer from 0, got {label!r}")
    return int(label)


def _split(name: str) -> tuple[str, str]:
    """Name and extension; as webdataset has it, the extension begins at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, (dot + extension).lower()
