"""Videos in folders and in lists of video files, and a survey of problems with them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vistok.data.clip_sources import ClipSource, OpenedClips
from vistok.data.clips import ClipTransform
from vistok.data.decoding import ImageDecoder
from vistok.data.files import SPLITS, printable
from vistok.data.sources import hash_lines
from vistok.data.tar import UNCONDITIONAL
from vistok.data.video_decoders import open_video
from vistok.data.videos import VIDEO_EXTENSIONS, UnreadableClipError, Video, is_frame
from vistok.utils.files import read_lines

_LAYOUTS = f"videos are files ({' '.join(VIDEO_EXTENSIONS)}) or folders of images, in <class>/ folders or side by side"


class VideoSource(OpenedClips):
    """Videos in files and folders of frames, each with a label.

    Args:
        paths: of the videos.
        labels: one per video.
        classes: names in the order of the labels; empty if there are none.
        decoder: of frames that are image files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str] = (),
        decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
    ):
        self.paths, self._labels, self.classes = list(paths), list(labels), tuple(classes)
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Video:
        return open_video(self.paths[index], self._decoder)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self) -> str:
        return hash_lines(f"{path} {path.stat().st_size if path.exists() else None}" for path in self.paths)


def folder_videos(
    root: str | Path,
    *,
    split: str | None = None,
    decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
) -> VideoSource:
    """All videos below a folder. The folders directly below it that contain videos are the classes.

    A GIF beside another video file of the same name counts as its preview (``vistok sample`` writes such previews), not
    as a video.

    Args:
        split: the folder with that name, if the root is divided into train/, val/ and so on; an undivided root holds
            training videos only. None takes the root as it is.
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
    found = sorted(videos_below(root), key=lambda path: path.relative_to(root).as_posix())
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


def videos_below(root: Path) -> list[Path]:
    """The video files below a folder, and the folders that hold images but no folders."""
    found = []
    names = {path.stem for path in root.iterdir() if path.suffix.lower() in VIDEO_EXTENSIONS and not _is_gif(path)}
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += [path] if is_frame_folder(path) else videos_below(path)
        elif path.suffix.lower() in VIDEO_EXTENSIONS and not (_is_gif(path) and path.stem in names):
            found.append(path)
    return found


def is_frame_folder(folder: Path) -> bool:
    """Whether a folder is a video: it holds images, its frames, and no folders."""
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(map(is_frame, inside)) and not any(entry.is_dir() for entry in inside)


def _is_gif(path: Path) -> bool:
    return path.suffix.lower() == ".gif"


def listed_videos(
    lists: str | Path,
    root: str | Path | None = None,
    *,
    decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
) -> VideoSource:
    """The videos in list files, in one of three formats:

    - UCF-101's: lines ``Action/v_Action_g01_c01.avi [label]``;
    - LARP's: CSV with the columns id, path, action, label;
    - Kinetics': CSV with the columns label, youtube_id, time_start, time_end. The file of a video is
      ``[label/]<youtube_id>_<start>_<end>.mp4``, with times padded to six digits.

    The classes are the sorted names of the actions; for UCF-101 they come from the names of the files.

    Args:
        lists: the path of a list, or several joined by "+".
        root: folder that paths are relative to; None is the folder of the list.

    Raises:
        FileNotFoundError: a list, or a video that it names, does not exist.
        ValueError: a list has another format or encoding, or only some videos have an action.
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
        shown = printable(", ".join(absent[:5]))
        raise FileNotFoundError(f"{len(absent)} of {len(rows)} videos of {lists} are not there: {shown}")
    classes = tuple(sorted({action for _, action in rows if action}))
    unlabelled = [video for video, action in rows if not action]
    if classes and unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(rows)} videos of {lists} have no action (such as "
            f"{printable(str(unlabelled[0]))}); give one to each, or to none"
        )
    places = {action: label for label, action in enumerate(classes)} | {"": UNCONDITIONAL}
    labels = [places[action] for _, action in rows]
    return VideoSource([path for path in found if path is not None], labels, classes, decoder)


def _rows(path: Path) -> list[tuple[str, str]]:
    """The (path, action) of each line of a list."""
    lines = [line for line in read_lines(path) if line.strip()]
    if path.suffix.lower() != ".csv":
        return [(line.split()[0], _action_of(line.split()[0])) for line in lines]
    try:
        reader = csv.DictReader(lines)
        columns, rows = set(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    read = _path_row if "path" in columns else _kinetics_row if columns >= KINETICS else None
    if read is None:
        raise ValueError(
            f"{path} has the columns {', '.join(sorted(columns))}; expected id, path, action, label, or label, "
            "youtube_id, time_start, time_end (Kinetics)"
        )
    found = []
    for number, row in enumerate(rows, 2):
        try:
            found.append(read(row))
        except (ValueError, TypeError) as error:  # a cell is missing, or is not a number
            raise ValueError(f"{path}: row {number} names no video: {error}") from error
    return found


KINETICS = {"youtube_id", "time_start", "time_end"}


def _path_row(row: Mapping[str, str | None]) -> tuple[str, str]:
    path = row["path"]
    if not path:
        raise ValueError("it has no path")
    return path, _ucf_action(path) or row.get("action") or row.get("label") or ""


def _kinetics_row(row: Mapping[str, str | None]) -> tuple[str, str]:
    name, start, end = row["youtube_id"], row["time_start"], row["time_end"]
    if not (name and start and end):
        raise ValueError("expected youtube_id, time_start and time_end")
    return f"{name}_{int(start):06d}_{int(end):06d}.mp4", row.get("label") or ""


def _locate(path: Path, action: str) -> Path | None:
    """The path of a video that exists: ``path`` itself, or its name in the folder of its action; None if neither."""
    return next((each for each in (path, path.parent / action / path.name) if each.exists()), None)


def _action_of(path: str) -> str:
    return _ucf_action(path) or (path.split("/")[0] if "/" in path else "")


def _ucf_action(path: str) -> str | None:
    match = re.match(r"v_(.+)_g\d+_c\d+", Path(path).stem)
    return match and match.group(1)


@dataclass(frozen=True)
class Survey:
    """The lengths of all videos (0 if unreadable), and the names of those with a problem."""

    lengths: list[int]
    unreadable: dict[str, str]
    too_short: dict[str, int]
    variable_rate: list[str]

    def describe(self) -> str:
        """One line with the counts, and the first names for each problem."""
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
    """Open every video once to count its frames (mostly without decoding), and name those with a problem."""
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
