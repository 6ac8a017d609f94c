"""Frames of video files and of folders of frames, by index.

Files are decoded by PyAV (``pip install vistok[video]``); ``video_decoders`` takes torchcodec where it is there. Frames
are counted from the packets of the file, so that frame i is the same whatever was read before it, and no time stamp of
a variable frame rate is guessed. They are shown as players show them: those that an edit list leaves out do not count,
and what a phone filmed upright stands upright.
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

# The demuxer of each extension is named, so that no file can pass for a playlist, which would open other files.
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
UNEVEN = 1.5  # frames that lie this much farther apart than others make a rate variable


class UnreadableClipError(Exception):
    """A clip that cannot be decoded, or is too short: ``args`` are its name and the reason."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class DecoderMissingError(ImportError):
    """PyAV is not installed."""


class Video(ABC):
    """A video whose frames are read by index."""

    path: Path
    decoder: str
    """What decodes it, with its version: goes into the record of what was read."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def read(self, frames: Sequence[int]) -> np.ndarray:
        """Frames (n, H, W, 3) uint8, in the order asked for; a frame may be asked for twice.

        Raises:
            UnreadableClipError: a damaged file, or a frame that is not there.
        """

    @property
    def variable_rate(self) -> bool:
        """Whether frames are shown for unlike times."""
        return False

    def _check(self, frames: Sequence[int]) -> None:
        outside = [frame for frame in frames if not 0 <= frame < len(self)]
        if outside:
            raise UnreadableClipError(str(self.path), f"there is no frame {outside[0]}; it has {len(self)}")


class VideoFile(Video):
    """A file of one of ``VIDEO_EXTENSIONS``.

    Args:
        path: of the file; its extension says what it is.
        opens: opens it, where it does not lie at ``path``: in a shard.

    Raises:
        UnreadableClipError: another extension, or a file that is no video.
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
                container.seek(min(wanted), stream=stream)  # to the last key frame that is not after it
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
        """Time stamps of all frames, ascending, in the stream's unit; their numbers where the file has none."""
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
        """How many degrees the frames are turned by."""
        with self._opened() as (container, stream):
            return next((frame.rotation for frame in container.decode(stream)), 0)

    @cached_property
    def _without_times(self) -> bool:
        """Whether frames can only be counted by decoding all: AVI keeps no time stamps, and those that FFmpeg derives
        from the order of the packets are wrong where that is not the order of the frames."""
        with self._opened() as (_, stream):
            return self.path.suffix.lower() == ".avi" and bool(stream.codec_context.has_b_frames)

    def _opened(self) -> _Opened:
        return _Opened(self.path, self._opens)


class _Opened:
    """A file that is being decoded: enters as (container, video stream); errors of the decoder name the file."""

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
        # A picture that is attached, the cover of a song, is no video.
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
    """A folder of images, one per frame, in the order of their names; numbers in names count as numbers."""

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
    """Frames (H, W, 3) of a video as one array (n, H, W, 3).

    Raises:
        UnreadableClipError: their sizes differ.
    """
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise UnreadableClipError(str(path), f"its frames are of unlike sizes: {sizes}")
    return np.stack(images)


def upright(image: np.ndarray, degrees: float) -> np.ndarray:
    """A frame (H, W, 3) turned counterclockwise by the quarter turns that its file asks for."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90)))


def _is_attached(stream: Any) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def is_frame(path: Path) -> bool:
    """Whether a file is one frame: an image, and no GIF, which is a video."""
    return is_image(path.name) and extension(path.name) not in FORMATS and not path.name.startswith(".")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts frame_9 before frame_10."""
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
