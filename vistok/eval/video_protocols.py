"""Protocols of the Frechet video distance: everything that has to be equal for two numbers to be comparable, by name.

A protocol fixes the feature network, length, stride and size of the clips, which clips make up each side, whether
pixels are rounded to 8 bit, and the normalisation of the covariance. Every score is recorded with
``VideoProtocol.describe``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

Choice = Literal["chunks", "random_start", "given"]
Pixels = Literal["float", "uint8_truncated", "uint8"]


@dataclass(frozen=True)
class VideoProtocol:
    """What one protocol fixes.

    Attributes:
        name: the protocol's name.
        real: which clips are the real side, in words.
        fake: which clips are the generated side, in words.
        detector: the feature network, a key of ``DETECTORS``; distances of other networks have another name.
        choice: how real clips are taken from videos: "chunks" takes all non-overlapping clips (tails are dropped),
            "random_start" one clip per video at a random start, "given" the first clip of each video.
        num_frames, frame_stride: number of frames of a clip, and their distance in the video.
        image_size: side of the frames in pixels.
        score_size: side to which frames are resized (antialiased bilinear) before the detector's own resize, or None.
        count: number of generated clips; None for as many as there are real ones.
        real_count: number of real clips, which ``seed`` draws; None for all.
        seed: of random starts, and of Python's ``random.Random(seed).sample``, which draws ``real_count`` clips; None
            if nothing is drawn. It is 0 where a paper names none.
        pixels: "float" scores clamped floats; "uint8_truncated" rounds (x + 1) / 2 * 255 down, which leaves half of the
            pixels a level too dark; "uint8" rounds to the nearest.
        ddof: the covariance is normalised by N - ddof.
        given_frames: number of first frames that a prediction is given; all decoded frames are scored.
        guidance_scale: the scale of the published numbers, or None; a benchmark at another scale gets a note.

    Raises:
        ValueError: clips are drawn without a seed.
    """

    name: str
    real: str
    fake: str
    choice: Choice
    detector: str = "i3d"
    num_frames: int = 16
    frame_stride: int = 1
    image_size: int = 128
    score_size: int | None = None
    count: int | None = None
    real_count: int | None = None
    seed: int | None = None
    pixels: Pixels = "float"
    ddof: int = 0
    given_frames: int = 0
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.seed is None and (self.real_count is not None or self.choice == "random_start"):
            raise ValueError(f"the protocol {self.name!r} draws real clips, which needs a seed")

    def describe(self) -> dict[str, Any]:
        """All attributes, JSON-ready."""
        return asdict(self)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless clips of this shape (B, C, T, H, W) have the protocol's length and size."""
        expected = (self.num_frames, self.image_size, self.image_size)
        if len(shape) != 5 or tuple(shape[2:]) != expected:
            raise ValueError(
                f"the protocol {self.name!r} scores clips (B, C, {', '.join(map(str, expected))}), got {tuple(shape)}"
            )

    def prepare(self, clips: Tensor) -> Tensor:
        """Convert float clips (B, C, T, H, W) in [-1, 1] to the detector's input in 0..255.

        Raises:
            ValueError: the clips' length or size is not the protocol's.
        """
        self.check_shape(clips.shape)
        values = (clips.float().clamp(-1, 1) + 1) * 127.5
        if self.pixels != "float":
            values = (values if self.pixels == "uint8_truncated" else values + 0.5).floor()
        if self.score_size is None or self.score_size == self.image_size:
            return values
        frames = values.transpose(1, 2)  # (B, T, C, H, W)
        size = (self.score_size, self.score_size)
        resized = F.interpolate(frames.flatten(0, 1), size, mode="bilinear", antialias=True, align_corners=False)
        return resized.unflatten(0, frames.shape[:2]).transpose(1, 2)


DETECTORS = {"i3d": ("i3d-kinetics400", "i3d-torchscript")}
"""The names of the networks that are a protocol's detector: I3D's port and its TorchScript file agree to 3e-4."""

RECONSTRUCTION = "larp-ucf-rec"
"""The default protocol of reconstructions."""

VIDEO_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # LARP (arXiv 2410.21264). The real side is the training list; "-val" is the counterpart with held-out clips.
        VideoProtocol(
            "larp-ucf-gen",
            real="10,000 of all 16-frame chunks of UCF-101 train (split 1)",
            fake="one sample per drawn clip, with its label",
            choice="chunks",
            count=10_000,
            real_count=10_000,
            seed=42,
            guidance_scale=1.25,
        ),
        VideoProtocol(
            "larp-ucf-gen-val",
            real="all 16-frame chunks of UCF-101 val (split 1), at most 10,000",
            fake="one sample per drawn clip, with its label",
            choice="chunks",
            real_count=10_000,
            seed=42,
            guidance_scale=1.25,
        ),
        VideoProtocol(
            "larp-k600-fp",
            real="50,000 of all 16-frame chunks of Kinetics-600 val",
            fake="prediction from the first 5 frames, all 16 decoded frames scored",
            choice="chunks",
            score_size=64,
            count=50_000,
            real_count=50_000,
            seed=42,
            given_frames=5,
        ),
        VideoProtocol(
            "larp-ucf-rec",
            real="UCF-101 train, one random 16-frame start per video",
            fake="their reconstructions, with the likeliest codes",
            choice="random_start",
            seed=0,
        ),
        VideoProtocol(
            "seed-voken-ucf-rec",
            real="the given test list of UCF-101 (3,783)",
            fake="their reconstructions",
            choice="given",
            pixels="uint8_truncated",
            ddof=1,
        ),
        # Skorokhodov et al., arXiv 2112.14683; the default of cd-fvd. The released UCF statistics use train and test.
        VideoProtocol("stylegan-v", real="every clip", fake="2,048 samples", choice="chunks", count=2048),
        VideoProtocol(
            "tats",
            real="2,048 random clips",
            fake="as many samples",
            choice="random_start",
            count=2048,
            real_count=2048,
            seed=0,
            ddof=1,
        ),
        VideoProtocol(
            "videogpt",
            real="256 random clips",
            fake="as many samples; the mean of several draws is reported",
            choice="random_start",
            count=256,
            real_count=256,
            seed=0,
            ddof=1,
        ),
    )
}


OWN = re.compile(r"own-(\d+)x(\d+)(?:-given(\d+))?")


def video_protocol(name: str) -> VideoProtocol:
    """The protocol of this name.

    Names such as ``own-16x32`` are for models of other sizes than the papers': all 16-frame chunks at 32 px. Their
    distances compare only with others of the same name. ``own-16x32-given5`` scores predictions from 5 frames.

    Raises:
        ValueError: there is no such protocol.
    """
    if name in VIDEO_PROTOCOLS:
        return VIDEO_PROTOCOLS[name]
    own = OWN.fullmatch(name)
    if own is None:
        raise ValueError(
            f"unknown video protocol {name!r}; known: {', '.join(VIDEO_PROTOCOLS)}, and own-FRAMESxSIDE, such as "
            "own-16x32 or own-16x32-given5"
        )
    num_frames, side, given = (int(number or 0) for number in own.groups())
    if not num_frames or not side or given >= num_frames:
        raise ValueError(f"{name!r} is no protocol: it needs frames, a side, and fewer given frames than frames")
    return VideoProtocol(
        name,
        real=f"all {num_frames}-frame chunks of the given videos",
        fake=f"predictions from the first {given} frames" if given else "the given videos",
        choice="chunks",
        num_frames=num_frames,
        image_size=side,
        given_frames=given,
    )


def is_video_protocol(name: str | None) -> bool:
    """Whether ``name`` is a protocol of clips, not of images."""
    return name is not None and (name in VIDEO_PROTOCOLS or OWN.fullmatch(name) is not None)


def chunks_of(lengths: list[int], num_frames: int, frame_stride: int = 1) -> list[tuple[int, int]]:
    """All non-overlapping clips of videos of ``lengths`` frames, as (video, first frame); tails are dropped."""
    span = num_frames * frame_stride
    return [(video, start) for video, length in enumerate(lengths) for start in range(0, length - span + 1, span)]


def drawn(total: int, count: int | None, seed: int | None) -> list[int]:
    """The indices of the clips that a protocol takes out of ``total``.

    They are drawn by Python's ``random.Random(seed).sample``. Without a count, or if there are at most ``count`` clips,
    all are taken in order.
    """
    if count is None or count >= total:
        return list(range(total))
    return random.Random(seed).sample(range(total), count)
