"""Videos in webdataset shards: .tar files in which the files of one sample share their name up to the extension."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vistok.data.clip_sources import ClipSource
from vistok.data.files import printable
from vistok.data.imagefiles import LeftOut
from vistok.data.remote import Shard
from vistok.data.shards import check_samples, class_names, local_shards, samples_of
from vistok.data.sources import hash_lines
from vistok.data.tar import Kind, open_member
from vistok.data.video_decoders import video_file
from vistok.data.videos import VIDEO_EXTENSIONS, VideoFile
from vistok.utils.files import cache_folder

VIDEOS = Kind("video", lambda: VIDEO_EXTENSIONS)


class ClipShardSource(ClipSource):
    """Videos in webdataset shards, which are indexed once and then read at random.

    The arguments, the labels and the errors are those of ``ShardSource``.
    """

    def __init__(self, pattern: Shard, *, split: str | None = "train", cache: Path | None = None) -> None:
        cache = cache or cache_folder("shards")
        self._paths = local_shards(pattern, split, cache)
        indices = [samples_of(path, number, cache, VIDEOS) for number, path in enumerate(self._paths)]
        self._samples = [sample for index in indices for sample in index.samples]
        left_out = sum((index.left_out for index in indices), LeftOut())
        wrong_label = next((index.wrong_label for index in indices if index.wrong_label), None)
        check_samples(pattern, self._paths, VIDEOS, len(self._samples), left_out, wrong_label)
        self.classes = class_names(pattern, self._paths, self._samples, VIDEOS)
        self._last: tuple[int, VideoFile] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def video(self, index: int) -> VideoFile:
        """Open a video; the last one stays open, because its length and its frames are read one after the other."""
        if self._last is None or self._last[0] != index:
            sample = self._samples[index]
            opens = partial(open_member, self._paths[sample.shard], sample.offset, sample.size)
            self._last = index, video_file(Path(self.name(index)), opens)
        return self._last[1]

    def length(self, index: int) -> int:
        return len(self.video(index))

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        return self.video(index).read(frames)

    def label(self, index: int) -> int:
        return self._samples[index].label

    def name(self, index: int) -> str:
        sample = self._samples[index]
        return printable(f"{self._paths[sample.shard]}:{sample.name}")

    def fingerprint(self) -> str:
        return hash_lines(f"{sample.name} {sample.size}" for sample in self._samples)
