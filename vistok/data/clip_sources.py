"""Sources of clips: videos with labels, by index."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from vistok.data.sources import hash_lines
from vistok.data.videos import UnreadableClipError, Video

log = logging.getLogger(__name__)


class ClipSource(ABC):
    """Videos with labels, by index.

    Attributes:
        classes: their names, in the order of the labels; empty if the videos have no classes.
    """

    classes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def length(self, index: int) -> int:
        """Number of frames of a video. Raises UnreadableClipError if it is damaged."""

    @abstractmethod
    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        """Frames (n, H, W, 1 or 3) uint8 of a video. Raises UnreadableClipError if it is damaged."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The class of a video; -1 if the source has no classes."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts that describe a video; most sources have none."""
        return ()

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call this video in a message."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the source holds other videos (names and sizes, not contents)."""


class OpenedClips(ClipSource):
    """A source whose videos are opened one at a time."""

    _last: tuple[int, Video] | None = None

    @abstractmethod
    def open(self, index: int) -> Video:
        """Open a video. Raises UnreadableClipError if it is damaged."""

    def video(self, index: int) -> Video:
        """Open a video; the last one stays open, because its length and its frames are read one after the other."""
        if self._last is None or self._last[0] != index:
            self._last = index, self.open(index)
        return self._last[1]

    def length(self, index: int) -> int:
        return len(self.video(index))

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        return self.video(index).read(frames)


class SelectedClips(ClipSource):
    """The videos of a source at ``indices``."""

    def __init__(self, source: ClipSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def length(self, index: int) -> int:
        return self.source.length(self.indices[index])

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        return self.source.read(self.indices[index], frames)

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def fingerprint(self) -> str:
        return hash_lines([self.source.fingerprint(), *map(str, self.indices)])


class InMemoryClips(ClipSource):
    """A source whose videos are decoded once and kept in memory at full size; meant for small frames."""

    def __init__(self, source: ClipSource) -> None:
        self._source, self.classes = source, source.classes
        log.info("decoding %d videos into memory", len(source))
        self._videos = [self._decode(index) for index in range(len(source))]

    def _decode(self, index: int) -> np.ndarray | UnreadableClipError:
        try:
            return self._source.read(index, range(self._source.length(index)))
        except UnreadableClipError as error:
            return error

    def _video(self, index: int) -> np.ndarray:
        video = self._videos[index]
        if isinstance(video, UnreadableClipError):
            raise video
        return video

    def __len__(self) -> int:
        return len(self._videos)

    def length(self, index: int) -> int:
        return len(self._video(index))

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        return self._video(index)[list(frames)]

    def label(self, index: int) -> int:
        return self._source.label(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()
