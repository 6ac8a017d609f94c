"""Opens videos with PyAV, or with torchcodec if it and its FFmpeg libraries are installed."""

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
    """A video file whose frames PyAV counts, as in every ``VideoFile``, and torchcodec decodes.

    So frame i is the same frame with either decoder. Its pixels may differ by single levels, as between two versions
    of FFmpeg. PyAV also decodes if the decoders count different frames, if frames are turned, or if time stamps are
    wrong.
    """

    def __init__(self, path: str | Path, opens: Callable[[], BinaryIO] | None = None):
        super().__init__(path, opens)
        self.decoder = f"torchcodec {torchcodec().__version__}, frames counted by {self.decoder}"

    def read(self, frames: Sequence[int]) -> np.ndarray:
        self._check(frames)  # PyAV has now opened the file with the demuxer of its extension, so it is no playlist
        if self._frames is None:
            return super().read(frames)
        try:
            return self._frames.get_frames_at([int(frame) for frame in frames]).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise UnreadableClipError(str(self.path), str(error).strip().splitlines()[0]) from error

    @cached_property
    def _frames(self) -> Any:
        """torchcodec's decoder; None if it counts other frames than PyAV, if the time stamps are wrong, or if frames
        must be turned, which not all of its versions do."""
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
    """The module ``torchcodec``; None if it is not installed, or cannot load FFmpeg's libraries."""
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
    """A video file with torchcodec if that can be loaded, else with PyAV alone."""
    return VideoFile(path, opens) if torchcodec() is None else TorchCodecFile(path, opens)


def open_video(path: str | Path, decoder: ImageDecoder = ImageDecoder()) -> Video:  # noqa: B008 (immutable)
    """A video file, or a folder of frames; ``decoder`` reads the frames of a folder."""
    path = Path(path)
    return FrameFolder(path, decoder) if path.is_dir() else video_file(path)


def decoder_versions() -> dict[str, str]:
    """The versions of the installed video decoders, which decoded frames may depend on."""
    try:
        found = {"av": require_pyav().__version__}
    except DecoderMissingError:
        return {}
    return found if torchcodec() is None else found | {"torchcodec": torchcodec().__version__}
