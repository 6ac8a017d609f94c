"""Videos in webdataset shards: .tar files in which the files of one sample share their name up to the extension."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vistok.data.clip_sources import OpenedClips
from vistok.data.files import printable
from vistok.data.remote import Shard
from vistok.data.shards import check_samples, class_names, fingerprint_of, index_shards, local_shards
from vistok.data.tar import Kind, open_member
from vistok.data.video_decoders import video_file
from vistok.data.videos import VIDEO_EXTENSIONS, VideoFile
from vistok.utils.files import cache_folder

VIDEOS = Kind("video", lambda: VIDEO_EXTENSIONS)


class ClipShardSource(OpenedClips):
    """Videos in webdataset shards, which are indexed once and then read at random.

    The arguments, the labels and the errors are those of ``ShardSource``.
    """

    def __init__(self, pattern: Shard, *, split: str | None = "train", cache: Path | None = None) -> None:
        cache = cache or cache_folder("shards")
        self._paths = local_shards(pattern, split, cache)
        self._samples, left_out, wrong_label = index_shards(self._paths, cache, VIDEOS)
        check_samples(pattern, self._paths, VIDEOS, len(self._samples), left_out, wrong_label)
        self.classes = class_names(pattern, self._paths, self._samples, VIDEOS)

    def __len__(self) -> int:
        return len(self._samples)

    def open(self, index: int) -> VideoFile:
        sample = self._samples[index]
        opens = partial(open_member, self._paths[sample.shard], sample.offset, sample.size)
        return video_file(Path(self.name(index)), opens)

    def label(self, index: int) -> int:
        return self._samples[index].label

    def name(self, index: int) -> str:
        sample = self._samples[index]
        return printable(f"{self._paths[sample.shard]}:{sample.name}")

    def fingerprint(self) -> str:
        return fingerprint_of(self._samples)
