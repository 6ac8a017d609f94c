"""Which decoder reads a video: PyAV, or torchcodec where it and the FFmpeg libraries that it needs are there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vistok.data.decoding import ImageDecoder
from vistok.data.videos import (
    DecoderMissingError,
    FrameFolder,
    UnreadableClipError,
    Video,
    VideoFile,
    require_pyav,
)

log = logging.getLogger(__name__)


class TorchCodecFile(VideoFile):
    """A video file whose frames are counted by PyAV, as those of every ``VideoFile``, and decoded by torchcodec.

    Frame i is therefore the same frame with either decoder; its pixels may differ by single levels, as those of two
    versions of FFmpeg do. PyAV decodes files of which torchcodec counts other frames, that are turned, or whose time
    stamps are wrong.
    """

    def __init__(self, path: str | Path, opens: Callable[[], BinaryIO] | None = None):
        super().__init__(path, opens)
        self.decoder = f"torchcodec {torchcodec().__version__}, frames counted by {self.decoder}"

    def read(self, frames: Sequence[int]) -> np.ndarray:
        self._check(frames)  # PyAV has opened the file by now, with the demuxer of its extension: it is no playlist
        if self._frames is None:
            return super().read(frames)
        try:
            return self._frames.get_frames_at([int(frame) for frame in frames]).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise UnreadableClipError(str(self.path), str(error).strip().splitlines()[0]) from error

    @cached_property
    def _frames(self) -> Any:
        """torchcodec's decoder; None where it does not count as PyAV does, goes by time stamps that are wrong, or
        would have to turn frames, which not all of its versions do."""
        if self._without_times or self._degrees:
            return None
        try:
            decoder = torchcodec().decoders.VideoDecoder(self._opens(), dimension_order="NHWC", seek_mode="exact")
        except (RuntimeError, ValueError) as error:
            raise UnreadableClipError(str(self.path), str(error).strip().splitlines()[0]) from error
        return decoder if len(decoder) == len(self) else None

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_frames"}


@cache
def torchcodec() -> Any:
    """The module ``torchcodec``; None where it is not installed, or finds no FFmpeg libraries that it can load."""
    try:
        import torchcodec
        import torchcodec.decoders
    except ImportError:
        return None
    except (OSError, RuntimeError) as error:
        log.info("torchcodec is installed but cannot be loaded, so PyAV decodes: %s", str(error).splitlines()[0])
        return None
    return torchcodec


def video_file(path: str | Path, opens: Callable[[], BinaryIO] | None = None) -> VideoFile:
    """A video file with the fastest decoder that is there."""
    return VideoFile(path, opens) if torchcodec() is None else TorchCodecFile(path, opens)


def open_video(path: str | Path, decoder: ImageDecoder = ImageDecoder()) -> Video:  # noqa: B008 (immutable)
    """A video file, or a folder of frames, which ``decoder`` reads."""
    path = Path(path)
    return FrameFolder(path, decoder) if path.is_dir() else video_file(path)


def decoder_versions() -> dict[str, str]:
    """What is there to decode videos: frames may depend on it."""
    try:
        found = {"av": require_pyav().__version__}
    except DecoderMissingError:
        return {}
    return found if torchcodec() is None else found | {"torchcodec": torchcodec().__version__}
