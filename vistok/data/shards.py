"""Images in webdataset shards: .tar files in which the files of one sample share their name up to the extension.

Shards are indexed once and then read at random. So batches, their order and resuming are exact, and do not depend on
the number of workers, as for any other source. Remote shards are fetched whole, once.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from vistok.data.captions import ShardCaptions
from vistok.data.decoding import ImageDecoder
from vistok.data.files import other_format, printable
from vistok.data.imagefiles import ImageFiles, LeftOut
from vistok.data.remote import Shard, check_address, fetch, is_remote
from vistok.data.sources import FileSource, hash_lines
from vistok.data.tar import IMAGES, MOST_CLASSES, UNCONDITIONAL, Index, Kind, Sample, index_shard, open_member
from vistok.signatures import ShellCommand
from vistok.utils.files import atomic_file, cache_folder, read_json, read_lines

log = logging.getLogger(__name__)

CLASS_NAMES = "classnames.txt"
INDEX_VERSION = 5
MOST_SHARDS = 100_000


class ShardFiles(ImageFiles):
    """The images of local shards, in the order of the shards.

    Args:
        paths: the shards.
        cache: the folder in which the indices of shards are kept; None keeps none.

    Raises:
        OSError: a shard cannot be read.
        ValueError: a shard is damaged or not a tar file, or a key has two images.
    """

    def __init__(self, paths: Sequence[Path], cache: Path | None) -> None:
        self._paths = paths
        self.source = printable(str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} shards)")
        self.samples, self.left_out, self.wrong_label = index_shards(paths, cache, IMAGES)

    def __len__(self) -> int:
        return len(self.samples)

    def path(self, index: int) -> str:
        return self.samples[index].name

    def shard(self, index: int) -> Path:
        """The path of the shard that an image lies in."""
        return self._paths[self.samples[index].shard]

    def open(self, index: int) -> BinaryIO:
        sample = self.samples[index]
        return open_member(self._paths[sample.shard], sample.offset, sample.size)

    def size(self, index: int) -> int:
        return self.samples[index].size

    def name(self, index: int) -> str:
        return printable(f"{self.shard(index)}:{self.samples[index].name}")


class ShardSource(FileSource):
    """Images of webdataset shards.

    The label of an image is the integer in its ``.cls`` file, else "label" of its ``.json``; without either the source
    is unconditional. Class names are the lines of ``classnames.txt`` beside local shards, else the ids as text.

    Args:
        pattern: a path or URL. ``{0000..0252}`` stands for a range of numbers, and ``{split}`` for the split; a path
            may have wildcards. URLs (``https://``, ``s3://``, …; see :mod:`vistok.data.remote`) are fetched into
            ``cache``.
        cache: the folder in which fetched shards and the indices of all shards are kept.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: a shard is damaged or not a tar file, a label is not a class id, only some images have labels, or
            ``pattern`` does not name a split.
        ConfigError: the package that reads such a URL is not installed.
    """

    def __init__(
        self,
        pattern: Shard,
        *,
        split: str | None = "train",
        decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
        cache: Path | None = None,
    ) -> None:
        cache = cache or cache_folder("shards")
        self._paths = local_shards(pattern, split, cache)
        files = ShardFiles(self._paths, cache)
        check_samples(pattern, self._paths, IMAGES, len(files), files.left_out, files.wrong_label)
        self._samples = files.samples
        super().__init__(files, [sample.label for sample in files.samples], decoder)
        self.classes = class_names(pattern, self._paths, self._samples, IMAGES)

    def fingerprint(self) -> str:
        return fingerprint_of(self._samples)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions.of(self._samples[index].shard, self._samples[index].name)

    @cached_property
    def _captions(self) -> ShardCaptions:
        return ShardCaptions(self._paths)


def local_shards(pattern: Shard, split: str | None, cache: Path) -> list[Path]:
    """The paths of the shards of a split; remote ones are fetched into ``cache``.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: ``pattern`` does not name a split.
        ConfigError: the package that reads such a URL is not installed.
    """
    if "{split}" not in str(pattern) and split not in (None, "train"):
        raise ValueError(f"data.root={pattern} names no split; write {{split}} where {split!r} belongs, or both")
    urls = shard_paths(_with_text(pattern, lambda text: text.replace("{split}", split or "")))
    return fetch(urls, cache) if is_remote(pattern) else [Path(str(url)) for url in urls]


def check_samples(
    pattern: Shard, paths: Sequence[Path], kind: Kind, count: int, left_out: LeftOut, wrong_label: str | None
) -> None:
    """Raise an error if shards hold no samples or a wrong label; warn of files that are left out.

    Raises:
        FileNotFoundError: no samples.
        ValueError: a label is not a class id.
    """
    if not count:
        raise FileNotFoundError(
            f"no {kind.name}s in the {len(paths)} shards of {pattern}; of {' '.join(kind.extensions())}"
            + (f" ({left_out})" if left_out.count else "")
        )
    if wrong_label:
        raise ValueError(wrong_label)
    if left_out.count:
        log.warning("%s: %s", pattern, left_out)


def class_names(pattern: Shard, paths: Sequence[Path], samples: Sequence[Sample], kind: Kind) -> tuple[str, ...]:
    """The names of the classes: from ``classnames.txt`` beside the first shard, else the ids as text; none if no sample
    has a label.

    Raises:
        ValueError: only some samples have labels, there are too few names, or they are not UTF-8.
    """
    unlabelled = [sample for sample in samples if sample.label == UNCONDITIONAL]
    if len(unlabelled) == len(samples):
        log.info('the %ss of %s have no labels, in .cls files or as "label" in .json files', kind.name, pattern)
        return ()
    if unlabelled:
        first = printable(f"{paths[unlabelled[0].shard]}:{unlabelled[0].name}")
        raise ValueError(
            f"{len(unlabelled)} of the {len(samples)} {kind.name}s of {pattern} have no label (such as {first}); "
            'give each its .cls, or "label" in its .json, or none of them'
        )
    count = 1 + max(sample.label for sample in samples)
    names = paths[0].with_name(CLASS_NAMES)
    if not names.exists():
        return tuple(map(str, range(count)))
    lines = tuple(read_lines(names))
    if len(lines) < count:
        raise ValueError(f"{names} names {len(lines)} classes, but there is a label {count - 1}")
    return lines


def shard_paths(pattern: Shard) -> list[Shard]:
    """The shards that a pattern stands for, in order.

    Raises:
        FileNotFoundError: no file at a local path or for a wildcard.
        ValueError: more than ``MOST_SHARDS`` shards, or an address that is not allowed.
    """
    paths: list[Shard] = []
    text = pattern.command if isinstance(pattern, ShellCommand) else pattern
    is_file = not is_remote(pattern) and os.path.exists(os.path.expanduser(text))  # braces and all
    expanded = [text] if is_file else list(itertools.islice(expand_braces(text), MOST_SHARDS + 1))
    if len(expanded) > MOST_SHARDS:
        raise ValueError(f"data.root={pattern} stands for more than {MOST_SHARDS:,} shards; is a number mistyped?")
    for part in expanded:
        path = ShellCommand(part) if isinstance(pattern, ShellCommand) else part
        if is_remote(path):
            check_address(path)
        local = os.path.expanduser(part)
        found = [path] if is_remote(path) else [local] if is_file else sorted(glob.glob(local))
        if folder := next((path for path in found if not is_remote(path) and os.path.isdir(str(path))), None):
            raise ValueError(
                f"data.root={pattern}: {folder} is a folder; shards are files, so write {folder}/*.tar for all in it "
                "(images side by side in a folder are data.source=folder)"
            )
        if not found:
            raise FileNotFoundError(f"no such shard: {path} (of data.root={pattern})")
        paths += found
    return paths


def _with_text(pattern: Shard, change: Callable[[str], str]) -> Shard:
    """The pattern, or the command, with its text changed."""
    return ShellCommand(change(pattern.command)) if isinstance(pattern, ShellCommand) else change(pattern)


def expand_braces(pattern: str) -> Iterator[str]:
    """``a-{00..02}.tar`` to a-00.tar, a-01.tar, a-02.tar; several pairs of braces give all combinations."""
    match = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from expand_braces(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def index_shards(paths: Sequence[Path], cache: Path | None, kind: Kind) -> Index:
    """The samples of all shards, in order; see ``samples_of``."""
    indices = [samples_of(path, number, cache, kind) for number, path in enumerate(paths)]
    return Index(
        [sample for index in indices for sample in index.samples],
        sum((index.left_out for index in indices), LeftOut()),
        next((index.wrong_label for index in indices if index.wrong_label), None),
    )


def fingerprint_of(samples: Sequence[Sample]) -> str:
    """A hash of the names and sizes of samples."""
    return hash_lines(f"{sample.name} {sample.size}" for sample in samples)


def samples_of(path: Path, number: int, cache: Path | None, kind: Kind) -> Index:
    """``index_shard``, with its result kept in ``cache``, because indexing a large set takes minutes.

    Raises:
        ValueError: the shard is cut, damaged or not a tar file; or see ``index_shard``.
    """
    status = path.stat()
    # A changed shard is indexed anew; so are all shards if the rules of indexing change.
    key = f"{INDEX_VERSION} {kind.extensions()} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    file = cache / "index" / f"{hash_lines([key])[:32]}.json" if cache is not None else None
    if file is not None:
        try:
            return _kept_index(read_json(file), number)
        except (OSError, ValueError, TypeError, KeyError):
            pass  # there is no kept index yet, or it is damaged
    try:
        index = index_shard(path, number, kind)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a readable .tar shard (compressed ones are not supported): {path.name} is no whole, "
            f"uncompressed .tar file ({error}){other_format(path, 'tar') or '; fetch or make it again'}"
        ) from error
    if file is not None:
        try:
            with atomic_file(file) as temporary:
                rows = [sample[1:] for sample in index.samples]
                temporary.write_text(json.dumps(index._asdict() | {"samples": rows}))
        except OSError as error:
            log.info("the index of %s is not kept: %s", path, error)
    return index


def _kept_index(kept: Any, number: int) -> Index:
    """The index of a shard from its kept form. Raises ValueError, TypeError or KeyError if that is damaged."""
    samples = [Sample(number, *row) for row in kept["samples"]]
    (count, names), wrong_label = kept["left_out"], kept["wrong_label"]
    for sample in samples:
        whole = all(type(value) is int for value in (sample.offset, sample.size, sample.label))
        if not whole or min(sample.offset, sample.size) < 0 or not UNCONDITIONAL <= sample.label < MOST_CLASSES:
            raise ValueError(f"no sample: {sample}")
    texts = [*(sample.name for sample in samples), *names, wrong_label or ""]
    if type(count) is not int or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts and a count are expected")
    return Index(samples, LeftOut(count, tuple(names)), wrong_label)
