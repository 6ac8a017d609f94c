"""Clips of videos: where they come from, which frames are taken, and batches of them.

A clip is ``num_frames`` frames that lie ``frame_stride`` apart. All its frames are resized, cropped and mirrored alike.
"""

from __future__ import annotations

import csv
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.config import check_least
from vistok.data.batches import Failures, ImageBatch
from vistok.data.decoding import Decoder
from vistok.data.files import SPLITS
from vistok.data.sources import hash_lines
from vistok.data.tar import UNCONDITIONAL
from vistok.data.videos import VIDEO_EXTENSIONS, UnreadableClipError, Video, is_frame, open_video
from vistok.draws import Keys

log = logging.getLogger(__name__)

Start = Literal["random", "center", "first"]
_LAYOUTS = f"videos are files ({' '.join(VIDEO_EXTENSIONS)}) or folders of images, in <class>/ folders or side by side"


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
        """Frames of a video. Raises UnreadableClipError for a damaged one."""

    @abstractmethod
    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        """Frames (n, H, W, 1 or 3) uint8 of a video. Raises UnreadableClipError for a damaged one."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The class of a video; -1 without classes."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts that describe a video; most sources have none."""
        return ()

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call this video in a message."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the source holds other videos (names and sizes, not contents)."""


class VideoSource(ClipSource):
    """Videos in files and folders of frames, each with a label.

    Args:
        paths: of the videos.
        labels: one per video.
        classes: their names; empty for none.
        decoder: of frames that are image files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str] = (),
        decoder: Decoder = Decoder(),  # noqa: B008 (immutable)
    ):
        self.paths, self._labels, self.classes = list(paths), list(labels), tuple(classes)
        self._decoder = decoder
        self._last: tuple[int, Video] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def video(self, index: int) -> Video:
        """The video, opened; the last one is kept."""
        if self._last is None or self._last[0] != index:
            self._last = index, open_video(self.paths[index], self._decoder)
        return self._last[1]

    def length(self, index: int) -> int:
        return len(self.video(index))

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        return self.video(index).read(frames)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self) -> str:
        return hash_lines(f"{path} {path.stat().st_size if path.exists() else None}" for path in self.paths)


class SelectedClips(ClipSource):
    """Some of a source's videos, by their indices there."""

    def __init__(self, source: ClipSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._indices)

    def length(self, index: int) -> int:
        return self._source.length(self._indices[index])

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        return self._source.read(self._indices[index], frames)

    def label(self, index: int) -> int:
        return self._source.label(self._indices[index])

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def fingerprint(self) -> str:
        return hash_lines([self._source.fingerprint(), *map(str, self._indices)])


class InMemoryClips(ClipSource):
    """A source whose videos are decoded once and kept whole: for small frames."""

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

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def folder_videos(
    root: str | Path,
    *,
    split: str | None = None,
    decoder: Decoder = Decoder(),  # noqa: B008 (immutable)
) -> VideoSource:
    """All videos below a folder. Folders right below it are classes, if videos lie in them.

    Args:
        split: the folder of that name, where the root is divided into train/, val/ and so on; an undivided root is all
            training videos. None takes the root as it is.
        decoder: of frames that are image files.

    Raises:
        FileNotFoundError: no such folder, or no videos in it.
        ValueError: videos both inside and beside class folders.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root} of videos")
    if split is not None and any((root / name).is_dir() for name in SPLITS):
        if not (root / split).is_dir():
            there = ", ".join(name for name in SPLITS if (root / name).is_dir())
            raise FileNotFoundError(f"{root} has no videos in {split}/; it has {there}")
        root = root / split
    elif split not in (None, "train"):
        raise FileNotFoundError(
            f"{root} is not divided into splits, so it has no {split!r}: put the videos into train/ and {split}/, or "
            "name another folder as root with data.split=null"
        )
    found = sorted(_videos_below(root), key=lambda path: path.relative_to(root).as_posix())
    if not found:
        raise FileNotFoundError(f"no videos in {root}; {_LAYOUTS}")
    owners = [path.relative_to(root).parts[0] if path.parent != root else "" for path in found]
    classes = tuple(sorted(set(owners)))
    if classes == ("",):
        return VideoSource(found, [UNCONDITIONAL] * len(found), decoder=decoder)
    if "" in classes:
        raise ValueError(
            f"{root} holds videos (such as {found[owners.index('')].name}) beside class folders; {_LAYOUTS}"
        )
    return VideoSource(found, [classes.index(owner) for owner in owners], classes, decoder)


def _videos_below(root: Path) -> list[Path]:
    """Video files, and folders that hold images and no folders."""
    found = []
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
            is_video = any(map(is_frame, inside)) and not any(entry.is_dir() for entry in inside)
            found += [path] if is_video else _videos_below(path)
        elif path.suffix.lower() in VIDEO_EXTENSIONS:
            found.append(path)
    return found


def listed_videos(
    lists: str | Path,
    root: str | Path | None = None,
    *,
    decoder: Decoder = Decoder(),  # noqa: B008 (immutable)
) -> VideoSource:
    """Videos named by list files: several are joined by "+".

    - UCF-101's own: a line ``Action/v_Action_g01_c01.avi [label]``;
    - LARP's CSV with the columns id, path, action, label;
    - Kinetics' CSV with the columns label, youtube_id, time_start, time_end: the file
      ``[label/]<youtube_id>_<start>_<end>.mp4``, starts and ends padded to six digits.

    Classes are the sorted names of the actions; those of UCF-101 come from the names of its files.

    Args:
        root: folder that paths are relative to; None is the folder of the list.

    Raises:
        FileNotFoundError: no such list, or a video that it names is not there.
        ValueError: a list of another form.
    """
    rows: list[tuple[Path, str]] = []
    for name in str(lists).split("+"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no list {path} of videos")
        base = path.parent if root is None else Path(root).expanduser()
        rows += [(base / video, action) for video, action in _rows(path)]
    if not rows:
        raise FileNotFoundError(f"{lists} names no videos")
    found = [_locate(video, action) for video, action in rows]
    absent = [str(video) for (video, _), there in zip(rows, found, strict=True) if there is None]
    if absent:
        shown = ", ".join(absent[:5])
        raise FileNotFoundError(f"{len(absent)} of {len(rows)} videos of {lists} are not there: {shown}")
    classes = tuple(sorted({action for _, action in rows if action}))
    labels = [classes.index(action) if action else UNCONDITIONAL for _, action in rows]
    return VideoSource([path for path in found if path is not None], labels, classes, decoder)


def _rows(path: Path) -> list[tuple[str, str]]:
    """(path, action) of each line of a list."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix.lower() != ".csv":
        return [(line.split()[0], _action_of(line.split()[0])) for line in lines]
    rows = list(csv.DictReader(lines))
    columns = set(rows[0]) if rows else set()
    if "path" in columns:
        return [(row["path"], _ucf_action(row["path"]) or row.get("action") or row.get("label") or "") for row in rows]
    if {"youtube_id", "time_start", "time_end"} <= columns:
        name = "{youtube_id}_{start:06d}_{end:06d}.mp4"
        return [
            (
                name.format(youtube_id=row["youtube_id"], start=int(row["time_start"]), end=int(row["time_end"])),
                row.get("label") or "",
            )
            for row in rows
        ]
    raise ValueError(
        f"{path} has the columns {', '.join(sorted(columns))}; expected id, path, action, label, or label, "
        "youtube_id, time_start, time_end (Kinetics)"
    )


def _locate(path: Path, action: str) -> Path | None:
    """The video, or the one of its name in the folder of its action."""
    return next((each for each in (path, path.parent / action / path.name) if each.exists()), None)


def _action_of(path: str) -> str:
    return _ucf_action(path) or (path.split("/")[0] if "/" in path else "")


def _ucf_action(path: str) -> str | None:
    match = re.match(r"v_(.+)_g\d+_c\d+", Path(path).stem)
    return match and match.group(1)


@dataclass(frozen=True)
class ClipTransform:
    """Which frames make a clip, and what is done to them.

    Attributes:
        num_frames: frames of a clip.
        image_size: side of the frames.
        frame_stride: how far apart they lie in the video; 1 takes consecutive ones.
        start: "random", "center" or "first" of the places where the clip fits.
        short: videos with too few frames: "repeat" the last frame, or "refuse".
        crop: "center" or "random" crop after the short side became ``image_size``, or "resize" without regard to the
            aspect; bilinear and antialiased.
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
        """Frames of the video from the first to the last of a clip."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def without_augmentation(self) -> ClipTransform:
        """The same clips for evaluation: from the middle, not mirrored."""
        crop = "center" if self.crop == "random" else self.crop
        return replace(self, start="center" if self.start == "random" else self.start, crop=crop, flip=False)

    def frames(self, length: int, uniform: float = 0.5) -> list[int]:
        """Which frames of a video of ``length`` make the clip; ``uniform`` in [0, 1) is the random start.

        Raises:
            ValueError: too few frames, where those are refused.
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

        ``uniforms`` are three numbers in [0, 1): for the left and the top edge, and mirroring.
        """
        clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()  # (T, C, H, W)
        clip = _resize(clip, self.image_size, keep_aspect=self.crop != "resize")
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
    """Clips (B, C, t, H, W) made ``num_frames`` long by repeating the last frame.

    Raises:
        ValueError: they are longer, or have no frames.
    """
    missing = num_frames - clips.shape[2]
    if missing < 0 or not clips.shape[2]:
        raise ValueError(f"{clips.shape[2]} frames cannot begin a clip of {num_frames}; give from 1 to {num_frames}")
    return torch.cat([clips, clips[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)


def _edge(side: int, size: int, uniform: float | None) -> int:
    """Where a crop begins: in the middle, as torchvision rounds it, or at random."""
    return round((side - size) / 2) if uniform is None else int(uniform * (side - size + 1))


def _resize(clip: Tensor, size: int, *, keep_aspect: bool) -> Tensor:
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
    """Reads clips of a source, by index. Every random choice is keyed by (seed, epoch, index)."""

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
        """A clip (C, T, H, W) in [-1, 1], and which frames of the video it is.

        Raises:
            UnreadableClipError: the video is damaged or too short.
        """
        start, *rest = uniforms
        try:
            frames = self.transform.frames(self.source.length(index), start)
        except ValueError as error:
            raise UnreadableClipError(self.source.name(index), str(error)) from error
        return self.transform.pixels(self.source.read(index, frames), rest), frames


@dataclass(frozen=True)
class Survey:
    """What a look at all videos found: their lengths (0 where unreadable), and what is wrong, by name."""

    lengths: list[int]
    unreadable: dict[str, str]
    too_short: dict[str, int]
    variable_rate: list[str]

    def describe(self) -> str:
        """The counts in one line, and the first names of each kind."""
        counts = f"{len(self.lengths)} videos"
        for what, names in (
            ("cannot be read", self.unreadable),
            ("are too short", self.too_short),
            ("have a variable frame rate", self.variable_rate),
        ):
            if names:
                shown = ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
                counts += f"; {len(names)} {what} ({shown})"
        return counts


def survey(source: ClipSource, transform: ClipTransform) -> Survey:
    """Open every video once, without decoding: count frames, and name what cannot be used."""
    lengths, unreadable, too_short, variable = [], {}, {}, []
    for index in range(len(source)):
        name = source.name(index)
        try:
            length = source.length(index)
        except UnreadableClipError as error:
            lengths.append(0)
            unreadable[name] = error.args[-1]
            continue
        lengths.append(length)
        if length < transform.span:
            too_short[name] = length
        if isinstance(source, VideoSource) and source.video(index).variable_rate:
            variable.append(name)
    return Survey(lengths, unreadable, too_short, variable)
