"""Videos that are decoded once and kept on disk, as 8-bit frames of the size that clips are cropped from.

Decoding takes far longer than reading. The small frames of a whole data set fit on a disk, but not in memory. The
files are memory-mapped, so that memory use stays flat and all workers share the system's file cache.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vistok.data.clip_sources import ClipSource
from vistok.data.clips import ClipTransform, resize_frames
from vistok.data.sources import hash_lines
from vistok.data.video_decoders import decoder_versions
from vistok.data.videos import UnreadableClipError
from vistok.utils.files import atomic_folder, cache_folder, read_json
from vistok.utils.progress import track

log = logging.getLogger(__name__)

FORMAT = "vistok-decoded-clips-1"
INDEX = "index.json"
SHARD_BYTES = 1 << 28
BLOCK = 64
"""Frames that are decoded at a time, so that memory never holds a whole film."""


class DecodedClips(ClipSource):
    """A source whose frames were resized, rounded to 8 bit, and kept in shards in a folder.

    Args:
        source: the videos.
        transform: its ``image_size`` and ``crop`` say how large frames are kept: with the short side of
            ``image_size``, or both sides if ``crop`` is "resize".
        cache: the folder of all such caches. The name of this source's own folder is a hash of all that its frames
            depend on. The first process that needs the folder makes it; the others wait.
    """

    def __init__(self, source: ClipSource, transform: ClipTransform, cache: Path | None = None) -> None:
        from filelock import FileLock

        self._source, self.classes = source, source.classes
        keep_aspect = transform.crop != "resize"
        parts = (FORMAT, source.fingerprint(), transform.image_size, keep_aspect, decoder_versions())
        folder = (cache or cache_folder("clips")) / hash_lines(map(str, parts))[:32]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                log.info("decoding %d videos into %s", len(source), folder)
                with atomic_folder(folder) as partial:
                    _write(source, partial, transform.image_size, keep_aspect=keep_aspect)
        self._folder = folder
        try:
            self._videos = read_json(folder / INDEX)["videos"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error!r}); remove {folder}, it is made again") from error
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._videos)

    def length(self, index: int) -> int:
        return self._entry(index)["shape"][0]

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        entry = self._entry(index)
        count = int(np.prod(entry["shape"]))
        start = entry["offset"]
        return self._shard(entry["shard"])[start : start + count].reshape(entry["shape"])[list(frames)]

    def label(self, index: int) -> int:
        return self._source.label(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def _entry(self, index: int) -> dict:
        entry = self._videos[index]
        if "error" in entry:
            raise UnreadableClipError(*entry["error"])
        return entry

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            self._shards[number] = np.memmap(_shard_file(self._folder, number), np.uint8, "r")
        return self._shards[number]

    def __getstate__(self) -> dict:
        """Workers that are spawned map the files themselves."""
        return self.__dict__ | {"_shards": {}}


def _write(source: ClipSource, folder: Path, size: int, *, keep_aspect: bool) -> None:
    """Write all videos one after another, in files of about ``SHARD_BYTES``, and an index that also lists the
    unreadable ones."""
    videos: list[dict] = []
    number = 0
    for index in track(range(len(source)), "decoding videos", len(source)):
        with open(_shard_file(folder, number), "ab") as file:
            offset = file.tell()
            try:
                shape = _append(source, index, file, size, keep_aspect=keep_aspect)
                videos.append({"shard": number, "offset": offset, "shape": shape})
            except UnreadableClipError as error:
                file.truncate(offset)
                videos.append({"error": list(error.args)})
            number += file.tell() > SHARD_BYTES
    (folder / INDEX).write_text(json.dumps({"format": FORMAT, "videos": videos}))


def _append(source: ClipSource, index: int, file: BinaryIO, size: int, *, keep_aspect: bool) -> list[int]:
    """Write the frames of a video; returns their shape (T, H, W, C)."""
    length, shape = source.length(index), [0, 0, 0]
    for start in range(0, length, BLOCK):
        frames = source.read(index, range(start, min(start + BLOCK, length)))
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()  # (n, C, H, W)
        resized = resize_frames(pixels, size, keep_aspect=keep_aspect).round().clamp(0, 255).to(torch.uint8)
        array = resized.permute(0, 2, 3, 1).contiguous().numpy()
        file.write(array.data)
        shape = list(array.shape[1:])
    return [length, *shape]


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"frames-{number:05d}.u8"
