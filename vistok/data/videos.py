"""Frames of video files and of folders of frames, by index.

PyAV decodes files (``pip install vistok[video]``); ``video_decoders`` uses torchcodec if it is installed. Frames are
counted from the packets of the file. So frame i does not depend on what was read before, and no time stamp of a
variable frame rate is guessed. Frames are those that players show: frames that an edit list leaves out do not count,
and frames with a rotation are turned upright.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from vistok.data.decoding import DECODING_ERRORS, ImageDecoder
from vistok.data.formats import extension, is_image

# The extension fixes the demuxer, so that no file can be opened as a playlist, which would open other files.
FORMATS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".avi": "avi",
    ".webm": "matroska",
    ".mkv": "matroska",
    ".gif": "gif",
}
VIDEO_EXTENSIONS = tuple(FORMATS)
UNEVEN = 1.5  # the frame rate is variable if the largest gap between frames exceeds the smallest by this factor


class UnreadableClipError(Exception):
    """A clip cannot be decoded, or is too short: ``args`` are its name and the reason."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class DecoderMissingError(ImportError):
    """PyAV is not installed."""


class Video(ABC):
    """A video whose frames are read by index."""

    path: Path
    decoder: str
    """The name and version of the decoder, for records."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def read(self, frames: Sequence[int]) -> np.ndarray:
        """Frames (n, H, W, 3) uint8 in the given order, which may repeat frames.

        Raises:
            UnreadableClipError: the file is damaged, or a frame does not exist.
        """

    @property
    def variable_rate(self) -> bool:
        """Whether frames are shown for different lengths of time."""
        return False

    def _check(self, frames: Sequence[int]) -> None:
        outside = [frame for frame in frames if not 0 <= frame < len(self)]
        if outside:
            raise UnreadableClipError(str(self.path), f"there is no frame {outside[0]}; it has {len(self)}")


class VideoFile(Video):
    """A video file with one of ``VIDEO_EXTENSIONS``.

    Args:
        path: of the file; its extension gives the format.
        opens: opens the file if it does not lie at ``path``, for example in a shard.

    Raises:
        UnreadableClipError: another extension. A file that is not a video raises it when it is first used.
        DecoderMissingError: PyAV is not installed.
    """

    def __init__(self, path: str | Path, opens: Callable[[], BinaryIO] | None = None):
        self.path = Path(path)
        self._opens = opens or partial(open, self.path, "rb")
        if self.path.suffix.lower() not in FORMATS:
            raise UnreadableClipError(
                str(path), f"{self.path.suffix or 'no'} extension is none of {' '.join(VIDEO_EXTENSIONS)}"
            )
        self.decoder = f"PyAV {require_pyav().__version__}"

    def __len__(self) -> int:
        return len(self._times)

    @property
    def variable_rate(self) -> bool:
        gaps = np.diff(self._times)
        return bool(len(gaps)) and gaps.max() > UNEVEN * gaps.min()

    def read(self, frames: Sequence[int]) -> np.ndarray:
        self._check(frames)
        wanted = {int(self._times[frame]) for frame in frames}
        found: dict[int, np.ndarray] = {}
        with self._opened() as (container, stream):
            if not self._without_times:
                container.seek(min(wanted), stream=stream)  # goes to the last key frame at or before this time
            for number, frame in enumerate(container.decode(stream)):
                time = number if self._without_times else frame.pts
                if time in wanted:
                    found[time] = upright(frame.to_ndarray(format="rgb24"), frame.rotation)
                    if len(found) == len(wanted):
                        break
        missing = [frame for frame in frames if int(self._times[frame]) not in found]
        if missing:
            raise UnreadableClipError(str(self.path), f"frame {missing[0]} of {len(self)} cannot be decoded")
        return stacked([found[int(self._times[frame])] for frame in frames], self.path)

    @cached_property
    def _times(self) -> np.ndarray:
        """The time stamps of all frames, ascending, in the stream's unit; frame numbers if ``_without_times``."""
        with self._opened() as (container, stream):
            if self._without_times:
                times = list(range(sum(1 for _ in container.decode(stream))))
            else:
                packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
                times = [packet.pts for packet in packets if packet.pts is not None]
        if not times:
            raise UnreadableClipError(str(self.path), "it holds no frames")
        return np.unique(np.asarray(times, dtype=np.int64))

    @cached_property
    def _degrees(self) -> float:
        """The rotation of the frames in degrees."""
        with self._opened() as (container, stream):
            return next((frame.rotation for frame in container.decode(stream)), 0)

    @cached_property
    def _without_times(self) -> bool:
        """Whether frames can only be counted by decoding all of them.

        AVI has no time stamps. FFmpeg derives them from the order of the packets, which is not that of the frames if
        the codec has B-frames.
        """
        with self._opened() as (_, stream):
            return self.path.suffix.lower() == ".avi" and bool(stream.codec_context.has_b_frames)

    def _opened(self) -> _Opened:
        return _Opened(self.path, self._opens)


class _Opened:
    """A context manager that opens a file for decoding, as (container, video stream). Its errors name the file."""

    def __init__(self, path: Path, opens: Callable[[], Any]):
        self.path, self._opens = path, opens

    def __enter__(self):
        av, form = require_pyav(), FORMATS[self.path.suffix.lower()]
        try:
            self._file = self._opens()
        except OSError as error:
            raise UnreadableClipError(str(self.path), _reason(error)) from error
        try:
            self._container = av.open(self._file, format=form)
        except (OSError, ValueError, av.FFmpegError) as error:
            self._file.close()
            raise UnreadableClipError(str(self.path), f"it cannot be opened as {form}: {_reason(error)}") from error
        # An attached picture, such as the cover of a song, is not a video.
        streams = [stream for stream in self._container.streams.video if not _is_attached(stream)]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
            self._container.close()
            self._file.close()
            raise UnreadableClipError(str(self.path), f"it holds no video stream, but {kinds}")
        return self._container, streams[0]

    def __exit__(self, kind, error, trace) -> None:
        self._container.close()
        self._file.close()
        if isinstance(error, (require_pyav().FFmpegError, ValueError, MemoryError)):
            raise UnreadableClipError(str(self.path), _reason(error)) from error


class FrameFolder(Video):
    """A folder with an image per frame, sorted by name; digits in names are compared as numbers."""

    def __init__(self, path: str | Path, decoder: ImageDecoder = ImageDecoder()):  # noqa: B008 (immutable)
        self.path = Path(path)
        self.files = sorted(filter(is_frame, self.path.iterdir()), key=_natural)
        self.decoder, self._decoder = f"Pillow {PIL.__version__}", replace(decoder, channels=3)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, frames: Sequence[int]) -> np.ndarray:
        self._check(frames)
        images = []
        for frame in frames:
            try:
                with open(self.files[frame], "rb") as file:
                    images.append(np.asarray(self._decoder.read(file)))
            except DECODING_ERRORS as error:
                raise UnreadableClipError(str(self.files[frame]), _reason(error)) from error
        return stacked(images, self.path)


def stacked(images: Sequence[np.ndarray], path: Path) -> np.ndarray:
    """Frames (H, W, 3) of the video at ``path`` as one array (n, H, W, 3).

    Raises:
        UnreadableClipError: the sizes of the frames differ.
    """
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise UnreadableClipError(str(path), f"its frames are of unlike sizes: {sizes}")
    return np.stack(images)


def upright(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turn a frame (H, W, 3) counterclockwise by ``degrees``, rounded to quarter turns."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90)))


def _is_attached(stream: Any) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def is_frame(path: Path) -> bool:
    """Whether a file is an image that can be a frame; a GIF is a video."""
    return is_image(path.name) and extension(path.name) not in FORMATS and not path.name.startswith(".")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A sort key that puts frame_9 before frame_10."""
    import re

    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name)]


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def require_pyav():
    """The module ``av``.

    Raises:
        DecoderMissingError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DecoderMissingError("video files need PyAV: pip install 'vistok[video]'") from error
    return av
