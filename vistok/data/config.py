"""The ``data`` section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vistok.data.decoding import Reading
from vistok.signatures import ShellCommand, check_least


@dataclass(frozen=True)
class Affine:
    """Largest values of the small random rotations, shifts and scalings; each is drawn uniformly from plus or minus it.

    Attributes:
        degrees: of the rotation.
        translate: of the shift on each axis, as a share of the image's side.
        scale: of the change in size, as a share: 0.1 gives images of 90 % to 110 %.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees must lie in 0..180, got {self.degrees}")
        if not (0 <= self.translate < 1 and 0 <= self.scale < 1):
            raise ValueError(f"translate and scale must lie in [0, 1), got {self.translate} and {self.scale}")


MOST_WORKERS = 1024
CLIP_SOURCES = ("videos", "video_list", "moving_digits")


@dataclass(frozen=True)
class DataConfig:
    """The source of images or clips, their preparation, and their batches.

    Attributes:
        image_size: side of the square images that come out, in pixels.
        source: ``folder`` (a folder or a .zip, see :class:`vistok.data.sources.FolderSource`), ``webdataset`` (shards,
            see :class:`vistok.data.shards.ShardSource`), ``huggingface`` (``datasets``, by ``name`` on the hub or saved
            in ``root``), ``torchvision`` (a dataset of torchvision by ``name``) or ``digits`` (scikit-learn's embedded
            8x8 digits). Clips: ``videos`` (a folder of video files or of folders of frames), ``webdataset`` with
            ``num_frames`` (shards of video files), ``video_list`` (list files as UCF-101, Kinetics and LARP have them,
            in ``name``, joined by "+", of videos in ``root``) or ``moving_digits`` (embedded).
        root: the folder or .zip file; the pattern of the shards; or the folder of torchvision's datasets. A command
            that writes shards is a ``ShellCommand``, never a text.
        name: the dataset's name: torchvision's, for example ``CIFAR10``, or its id on the hub. For ``digits``:
            ``turned`` (each digit upright, turned left and turned right) or ``styled`` (as it is, slanted, thin and
            bold). For ``moving_digits``: ``sideways`` (motion to the left and right only).
        image_column, label_column: the columns of images and class ids in a data set of the hub; by default its only
            image column and its only class label column.
        caption_column: the column of texts in a data set of the hub, if any.
        captions: the texts of an image: its ``own`` captions, or the name of its class (``class_names``).
        split: ``train``, ``test``, ``val``, …; None takes a folder as it is.
        target_root: a folder with an image of the same name for each image of ``root``. A tokenizer reads the image
            of ``root`` and reconstructs that of ``target_root``, as in post-training on generated images (arXiv
            2509.12474). The transform must not be random then.
        download: lets torchvision download what ``root`` lacks.
        channels: 3 (RGB) or 1 (grey).
        reading: ``photo``: upright as the EXIF data say, transparent parts on white, 16 bits scaled to 8; ``raw``: as
            the suites of published protocols read files, which ignore orientation and alpha.
        num_frames: frames of a clip; None reads images.
        frame_stride: distance of a clip's frames in the video; 1 takes consecutive ones.
        clip_start: where in its video a training clip begins: ``random``, ``center`` or ``first``; evaluation takes
            ``center`` instead of ``random``.
        short_clips: if a video has too few frames, ``repeat`` its last one, or leave the video out and name it in a
            warning (``refuse``).
        limit: keep this many images, evenly spread over the source; None keeps all.
        crop: ``center``: ADM's centre crop; ``random``: short side to ``image_size``, random position (ViT-VQGAN);
            ``random_resized``: short side drawn in [size, size / 0.8], random position (ADM, LlamaGen);
            ``resize``: both sides to ``image_size``, whatever the aspect ratio. Evaluation takes ``center`` instead of
            the random crops.
        flip: mirror a random half of the training images.
        affine: small random rotations, shifts and scalings of training images.
        order: of training images: ``shuffled``, every one once per epoch; or ``resampled``, drawn with replacement.
        batch_size: images per batch and process.
        num_workers: processes that decode; the batches do not depend on it.
        cache: ``memory`` decodes every image or video once and keeps it; ``disk`` keeps the frames of videos in the
            user's cache folder, in 8 bit, with the short side (with ``crop: resize``, both sides) of ``image_size``.
        seed: of the order and of every augmentation.
    """

    image_size: int
    source: Literal[
        "folder", "webdataset", "huggingface", "torchvision", "digits", "videos", "video_list", "moving_digits"
    ] = "folder"
    root: str | ShellCommand | None = None
    name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    captions: Literal["own", "class_names"] = "own"
    split: str | None = "train"
    target_root: str | None = None
    download: bool = False
    channels: Literal[1, 3] = 3
    reading: Reading = "photo"
    num_frames: int | None = None
    frame_stride: int = 1
    clip_start: Literal["random", "center", "first"] = "random"
    short_clips: Literal["repeat", "refuse"] = "repeat"
    limit: int | None = None
    crop: Literal["center", "random", "random_resized", "resize"] = "center"
    flip: bool = False
    affine: Affine | None = None
    order: Literal["shuffled", "resampled"] = "shuffled"
    batch_size: int = 64
    num_workers: int = 0
    cache: Literal["none", "memory", "disk"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.root, str) and self.root.lower().startswith(ShellCommand.PREFIX):
            raise ValueError(
                f"root is {self.root!r}, which would run a command; only the command line may ask for that: "
                "data.root='pipe:…' with --allow-commands"
            )
        if isinstance(self.root, ShellCommand) and self.source != "webdataset":
            raise ValueError(f"root is a command, {self.root}, which only source: webdataset reads")
        check_least(self, image_size=1, batch_size=1, num_workers=0, seed=0)
        if self.num_workers > MOST_WORKERS:
            raise ValueError(f"num_workers must be at most {MOST_WORKERS}, a process each, got {self.num_workers}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all images, got {self.limit}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if self.num_frames is not None:
            check_least(self, num_frames=1, frame_stride=1)
        elif self.frame_stride != 1:
            raise ValueError(f"frame_stride is {self.frame_stride}, but there are no clips: num_frames is not set")
        if self.source in CLIP_SOURCES or self.num_frames is not None:
            self._check_clips()
        if self.cache == "disk" and self.num_frames is None:
            raise ValueError("cache: disk keeps the frames of videos, and num_frames is not set; images take memory")
        if self.target_root is not None and self.source != "folder":
            raise ValueError(f"target_root pairs files of folders; source is {self.source!r}, not 'folder'")

    def _check_clips(self) -> None:
        if self.num_frames is None:
            raise ValueError(f"source {self.source} has clips; say how long they are with num_frames")
        if self.crop == "random_resized" or self.affine is not None:
            raise ValueError("clips are cropped by center, random or resize, and are not turned or scaled (affine)")

    @property
    def title(self) -> str:
        """The source and the split, for reports."""
        everything = "all images" if self.num_frames is None else "all clips"
        return f"{self.name or self.root or self.source} ({self.split or everything})"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a sample's pixels: (C, H, W) of an image, (C, T, H, W) of a clip."""
        frames = () if self.num_frames is None else (self.num_frames,)
        return (self.channels, *frames, self.image_size, self.image_size)
