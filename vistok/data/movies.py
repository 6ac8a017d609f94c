"""From pixels to movies: 8-bit frames, MP4 and GIF files, contact sheets, and movies that play in a notebook.

Clips are float (B, C, T, H, W) in [-1, 1], C = 1 (grey) or 3 (RGB). MP4 files are lossy: scores are taken from pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.data.clips import ClipTransform
from vistok.data.decoding import ImageDecoder
from vistok.data.pictures import comparison, grid, to_pil, to_uint8
from vistok.data.videos import require_pyav
from vistok.utils.files import atomic_file

FPS = 8


def to_frames(pixels: Tensor) -> np.ndarray:
    """Clips (B, C, T, H, W) to frames (B, T, H, W, C) uint8.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if pixels.ndim != 5 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"clips must be (B, 1 or 3, T, H, W), got {tuple(pixels.shape)}; are C and T swapped?")
    return to_uint8(pixels).permute(0, 2, 3, 4, 1).cpu().numpy()


def to_images(frames: np.ndarray) -> list[Image.Image]:
    """Frames (T, H, W, C) uint8 of one clip as T images of mode L or RGB."""
    return [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]


def shown(pixels: Tensor) -> list[Image.Image]:
    """A picture of each image (B, C, H, W) or clip (B, C, T, H, W) in [-1, 1]; that of a clip shows its frames in a
    row."""
    if pixels.ndim != 5:
        return to_pil(pixels)
    return [contact_sheet([frames]) for frames in to_frames(pixels)]


def overview(pixels: Tensor) -> Image.Image:
    """A picture of all images (B, C, H, W) in a grid, or of all clips (B, C, T, H, W), one per row."""
    return grid(shown(pixels), columns=1 if pixels.ndim == 5 else None)


def compared(originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """A picture of images (B, C, H, W) or clips (B, C, T, H, W), each above its reconstruction."""
    if originals.ndim != 5:
        return comparison(originals, reconstructions)
    rows = [picture for pair in zip(shown(originals), shown(reconstructions), strict=True) for picture in pair]
    return grid(rows, columns=1)


def save_mp4(frames: np.ndarray, path: str | Path, fps: float = FPS) -> None:
    """Write frames (T, H, W, C) uint8 as H.264; the file appears whole or not at all.

    H.264 needs even sides; the last row or column of an odd side is repeated.

    Raises:
        DecoderMissingError: PyAV is not installed.
        ValueError: another shape or type, or no frames.
    """
    with atomic_file(path, durable=False) as temporary, open(temporary, "wb") as file:
        _encode(frames, file, fps)


def mp4_bytes(frames: np.ndarray, fps: float = FPS) -> bytes:
    """Frames (T, H, W, C) uint8 as the content of an MP4 file; see :func:`save_mp4`."""
    buffer = io.BytesIO()
    _encode(frames, buffer, fps)
    return buffer.getvalue()


def _encode(frames: np.ndarray, file: IO[bytes], fps: float) -> None:
    if frames.ndim != 4 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"a movie is made of uint8 frames (T, H, W, C), got {frames.dtype} {frames.shape}")
    av = require_pyav()
    rgb = np.repeat(frames, 3, -1) if frames.shape[-1] == 1 else frames
    rgb = np.pad(rgb, ((0, 0), (0, rgb.shape[1] % 2), (0, rgb.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "15"})
        stream.height, stream.width, stream.pix_fmt = rgb.shape[1], rgb.shape[2], "yuv420p"
        for array in rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
        container.mux(stream.encode())


def save_gif(frames: np.ndarray, path: str | Path, fps: float = FPS) -> None:
    """Write frames (T, H, W, C) uint8 as a GIF that repeats; the file appears whole or not at all."""
    with atomic_file(path, durable=False) as temporary:
        temporary.write_bytes(gif_bytes(frames, fps))


def gif_bytes(frames: np.ndarray, fps: float = FPS) -> bytes:
    """Frames (T, H, W, C) uint8 as the content of a GIF file that repeats."""
    first, *rest = to_images(frames)
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def side_by_side(clips: Sequence[np.ndarray] | np.ndarray, columns: int | None = None) -> np.ndarray:
    """Clips (T, H, W, C) uint8 of one size as one clip that shows all at once, in a grid; see ``grid``."""
    sheets = [grid(list(frames), columns) for frames in zip(*map(to_images, clips), strict=True)]
    frames = np.stack([np.asarray(sheet) for sheet in sheets])
    return frames if frames.ndim == 4 else frames[..., None]


def contact_sheet(clips: Sequence[np.ndarray] | np.ndarray, columns: int = 8) -> Image.Image:
    """A picture with a row for each clip (T, H, W, C) uint8: up to ``columns`` of its frames, evenly spread in time.

    Raises:
        ValueError: no clips, or clips of different sizes.
    """
    if not len(clips):
        raise ValueError("there are no clips to lay out")
    columns = min(columns, min(len(clip) for clip in clips))
    images = [image for clip in clips for image in to_images(clip[_evenly_spaced(len(clip), columns)])]
    return grid(images, columns)


def _evenly_spaced(length: int, count: int) -> list[int]:
    """The indices of ``count`` of ``length`` frames, evenly spread from the first to the last."""
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


def frames_to_pixels(frames: np.ndarray | Tensor | Sequence[Image.Image], size: int, channels: int) -> Tensor:
    """Frames as clips (B, channels, T, size, size) in [-1, 1].

    Args:
        frames: uint8 (T, H, W, C) or (B, T, H, W, C), or the PIL images of one clip, read like photos (see
            ``ImageDecoder``): these are resized and cropped in the centre. Float clips (B, C, T, H, W) in [-1, 1] are
            returned as they are.

    Raises:
        ValueError: another shape or type, or images whose white is not known.
    """
    if isinstance(frames, Tensor) and frames.is_floating_point():
        if frames.ndim != 5:
            raise ValueError(f"float frames must be clips (B, C, T, H, W) in [-1, 1], got {tuple(frames.shape)}")
        return frames
    if isinstance(frames, Sequence):
        others = [type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)]
        if others or not frames:
            what = f"{others[0]} in it" if others else "an empty one"
            raise ValueError(f"a list of frames holds the images of one clip, got {what}; stack arrays of frames")
        frames = [ImageDecoder(3).convert(image) for image in frames]
        sizes = sorted({image.size for image in frames})
        if len(sizes) > 1:
            raise ValueError(f"frames of one clip are of one size, got (width, height) {sizes}")
        frames = np.stack([np.asarray(image) for image in frames])
    array = np.asarray(frames)
    array = array[None] if array.ndim == 4 else array
    if array.ndim != 5 or array.dtype != np.uint8 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"frames must be uint8 (T, H, W, C) or (B, T, H, W, C) with 1 or 3 channels, got {array.dtype} "
            f"{array.shape}"
        )
    transform = ClipTransform(array.shape[1], size, channels=1 if channels == 1 else 3)
    return torch.stack([transform.pixels(clip) for clip in array])


class Movie:
    """A clip that plays by itself in a notebook.

    Attributes:
        frames: (T, H, W, C) uint8.
        fps: frames per second.
    """

    def __init__(self, frames: np.ndarray, fps: float = FPS):
        self.frames, self.fps = frames, fps

    def save(self, path: str | Path) -> None:
        """Write an .mp4 or a .gif file.

        Raises:
            ValueError: another extension.
        """
        writers = {".mp4": save_mp4, ".gif": save_gif}
        extension = Path(path).suffix.lower()
        if extension not in writers:
            raise ValueError(f"a movie is written as .mp4 or .gif, not as {extension or 'a file without extension'}")
        writers[extension](self.frames, path, self.fps)

    def _repr_html_(self) -> str:
        return self.html(max(self.frames.shape[2], 128))

    def html(self, width: int) -> str:
        """A video element of ``width`` CSS pixels that plays by itself."""
        content = base64.b64encode(mp4_bytes(self.frames, self.fps)).decode()
        return (
            f'<video controls loop autoplay muted width="{width}" style="image-rendering: pixelated">'
            f'<source src="data:video/mp4;base64,{content}" type="video/mp4"></video>'
        )
