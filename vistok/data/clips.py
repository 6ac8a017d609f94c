"""Clips: the choice of frames from a video, their transforms, and batches of clips.

A clip is ``num_frames`` frames that lie ``frame_stride`` apart. All its frames get the same resizing, crop and flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.batches import Failures, ImageBatch
from vistok.data.clip_sources import ClipSource
from vistok.data.transforms import crop_source
from vistok.data.videos import UnreadableClipError
from vistok.draws import Keys
from vistok.signatures import check_least

Start = Literal["random", "center", "first"]


@dataclass(frozen=True)
class ClipTransform:
    """Chooses the frames of a clip, and turns them into pixels.

    Attributes:
        num_frames: frames of a clip.
        image_size: side of the frames.
        frame_stride: distance of the frames in the video; 1 takes consecutive ones.
        start: "random", "center" or "first" of the positions where the clip fits.
        short: for videos with too few frames: "repeat" the last frame, or "refuse".
        crop: "center" or "random" crop after the short side is resized to ``image_size``; or "resize" both sides,
            whatever the aspect ratio. Resizing is bilinear and antialiased.
        flip: mirror half of the clips.
        channels: 3 (RGB) or 1 (grey).
    """

    num_frames: int
    image_size: int
    frame_stride: int = 1
    start: Start = "random"
    short: Literal["repeat", "refuse"] = "repeat"
    crop: Literal["center", "random", "resize"] = "center"
    flip: bool = False
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        check_least(self, num_frames=1, image_size=1, frame_stride=1)
        for name, allowed in (
            ("start", ("random", "center", "first")),
            ("short", ("repeat", "refuse")),
            ("crop", ("center", "random", "resize")),
            ("channels", (1, 3)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")

    @property
    def span(self) -> int:
        """How many frames of the video a clip covers, from its first to its last."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def without_augmentation(self) -> ClipTransform:
        """The transform that evaluation uses: centre instead of random starts and crops, nothing mirrored."""
        crop = "center" if self.crop == "random" else self.crop
        return replace(self, start="center" if self.start == "random" else self.start, crop=crop, flip=False)

    def frames(self, length: int, uniform: float = 0.5) -> list[int]:
        """The indices of a clip's frames in a video of ``length`` frames.

        Args:
            uniform: in [0, 1); chooses a random start.

        Raises:
            ValueError: too few frames, and ``short`` is "refuse".
        """
        if length < self.span and self.short == "refuse":
            raise ValueError(
                f"it has {length} frames, fewer than the {self.span} that {self.num_frames} frames with a stride of "
                f"{self.frame_stride} need"
            )
        places = max(length - self.span, 0) + 1
        start = {"random": int(uniform * places), "center": (places - 1) // 2, "first": 0}[self.start]
        return [min(start + self.frame_stride * number, length - 1) for number in range(self.num_frames)]

    def pixels(self, frames: np.ndarray, uniforms: Sequence[float] = (0.5, 0.5, 1.0)) -> Tensor:
        """Frames (T, H, W, 1 or 3) uint8 to a clip (C, T, size, size) in [-1, 1].

        Args:
            uniforms: three numbers in [0, 1): for the left edge, the top edge and the flip.
        """
        clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()  # (T, C, H, W)
        clip = resize_frames(clip, self.image_size, keep_aspect=self.crop != "resize")
        height, width = clip.shape[-2:]
        random = uniforms[:2] if self.crop == "random" else (None, None)
        left, top = (_edge(side, self.image_size, u) for side, u in zip((width, height), random, strict=True))
        clip = clip[..., top : top + self.image_size, left : left + self.image_size]
        if self.flip and uniforms[2] < 0.5:
            clip = clip.flip(-1)
        if self.channels == 3:
            clip = clip.expand(-1, 3, -1, -1)
        elif clip.shape[1] == 3:
            weights = clip.new_tensor([0.299, 0.587, 0.114])  # as Pillow makes grey
            clip = (clip * weights[:, None, None]).sum(1, keepdim=True)
        return (clip / 127.5 - 1).transpose(0, 1).contiguous()


def repeat_last(clips: Tensor, num_frames: int) -> Tensor:
    """Extend clips (B, C, t, H, W) to ``num_frames`` by repeating the last frame.

    Raises:
        ValueError: the clips are longer, or have no frames.
    """
    missing = num_frames - clips.shape[2]
    if missing < 0 or not clips.shape[2]:
        raise ValueError(f"{clips.shape[2]} frames cannot begin a clip of {num_frames}; give from 1 to {num_frames}")
    return torch.cat([clips, clips[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)


def _edge(side: int, size: int, uniform: float | None) -> int:
    """Where a crop begins: in the middle, as torchvision rounds it, or at random."""
    return round((side - size) / 2) if uniform is None else int(uniform * (side - size + 1))


def resize_frames(clip: Tensor, size: int, *, keep_aspect: bool) -> Tensor:
    """Resize frames (T, C, H, W), bilinear and antialiased: the short side to ``size``, or both sides.

    With ``keep_aspect``, only the middle of frames of extreme shapes is kept, see ``crop_source``.
    """
    if keep_aspect:
        left, top, right, bottom = crop_source((clip.shape[-1], clip.shape[-2]))
        clip = clip[..., top:bottom, left:right]
    height, width = clip.shape[-2:]
    if keep_aspect:
        short = min(height, width)
        shape = (int(size * height / short), int(size * width / short))
    else:
        shape = (size, size)
    if shape == (height, width):
        return clip
    return F.interpolate(clip, shape, mode="bilinear", antialias=True, align_corners=False)


class ClipBatches:
    """Reads batches of clips from a source. Every random choice is keyed by (seed, epoch, index)."""

    def __init__(self, source: ClipSource, transform: ClipTransform, *, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: np.ndarray, epoch: int) -> tuple[ImageBatch, Failures]:
        """Clips (B, C, T, H, W) of the videos at ``indices``; damaged and too short ones are left out and named."""
        clips, labels, read, failures = [], [], [], {}
        keys = Keys.of(self.seed, indices, step=epoch)
        for index, uniforms in zip(keys.indices, keys.uniform("clip", 4).tolist(), strict=True):
            try:
                clips.append(self.clip(index, uniforms)[0])
            except UnreadableClipError as error:
                failures[index] = str(error)
                continue
            labels.append(self.source.label(index))
            read.append(index)
        pixels = torch.stack(clips) if clips else torch.empty(0)
        return ImageBatch(pixels, torch.tensor(labels, dtype=torch.int64), torch.tensor(read)), failures

    def clip(self, index: int, uniforms: Sequence[float]) -> tuple[Tensor, list[int]]:
        """A clip (C, T, H, W) in [-1, 1], and the indices of its frames in the video.

        Args:
            uniforms: four numbers in [0, 1): for the start, the left edge, the top edge and the flip.

        Raises:
            UnreadableClipError: the video is damaged or too short.
        """
        start, *rest = uniforms
        try:
            frames = self.transform.frames(self.source.length(index), start)
        except ValueError as error:
            raise UnreadableClipError(self.source.name(index), str(error)) from error
        return self.transform.pixels(self.source.read(index, frames), rest), frames
