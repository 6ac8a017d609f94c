"""Moving digits: clips made from scikit-learn's embedded digits, without any file. The class is the digit.

After Moving MNIST (Srivastava et al., arXiv 1502.04681), with one digit per clip. It moves on a straight line and
bounces off the edges. Its first position and its velocity follow from (seed, clip).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vistok.data.clip_sources import ClipSource
from vistok.data.decoding import ImageDecoder
from vistok.data.sources import DigitsSource, hash_lines
from vistok.draws import Keys


class MovingDigitsSource(ClipSource):
    """Grey clips (T, size, size, 1) of one moving digit each.

    Args:
        split: "train", "test" or None for both, as for the digits.
        image_size: side of the frames in pixels; the side of the digit is half of it.
        num_frames: frames of a video.
        sideways: digits move only to the left and right, at half height.
        motions: videos per digit image, which differ in their motion.
        speed: smallest and largest distance per frame, as a share of the side.
        seed: of the motions.

    Raises:
        ValueError: frames too small for a digit, or speeds that are not ordered.
    """

    def __init__(
        self,
        *,
        split: str | None = "train",
        image_size: int = 32,
        num_frames: int = 16,
        sideways: bool = False,
        motions: int = 1,
        speed: tuple[float, float] = (0.03, 0.09),
        seed: int = 0,
    ) -> None:
        if image_size < 16:
            raise ValueError(f"moving digits need frames of at least 16 px, got {image_size}")
        if not 0 <= speed[0] <= speed[1] < 0.5:
            raise ValueError(f"speed must be two ascending shares in [0, 0.5), got {speed}")
        if motions < 1 or num_frames < 1:
            raise ValueError(f"motions and num_frames must be at least 1, got {motions} and {num_frames}")
        self._digits = DigitsSource(split=split, decoder=ImageDecoder(1))
        self.image_size, self.num_frames, self.motions, self.speed, self.seed = (
            image_size,
            num_frames,
            motions,
            speed,
            seed,
        )
        self.side, self.sideways = image_size // 2, sideways
        self.classes = self._digits.classes

    def __len__(self) -> int:
        return len(self._digits) * self.motions

    def length(self, index: int) -> int:
        return self.num_frames

    def label(self, index: int) -> int:
        return self._digits[index // self.motions][1]

    def read(self, index: int, frames: Sequence[int]) -> np.ndarray:
        digit = self._digits[index // self.motions][0]
        side = self.side
        stamp = np.asarray(digit.resize((side, side), Image.Resampling.BICUBIC))
        canvas = np.zeros((len(frames), self.image_size, self.image_size, 1), np.uint8)
        for image, (left, top) in zip(canvas, self.positions(index, frames), strict=True):
            image[top : top + side, left : left + side, 0] = stamp
        return canvas

    def positions(self, index: int, frames: Sequence[int]) -> np.ndarray:
        """The left and top edge of the digit in the given frames: (n, 2) integers."""
        room = self.image_size - self.side
        uniforms = Keys.of(self.seed, [index]).uniform("motion", 4)[0].double().numpy()
        angle, speed = (
            2 * np.pi * uniforms[2],
            self.image_size * (self.speed[0] + uniforms[3] * (self.speed[1] - self.speed[0])),
        )
        velocity, begin = speed * np.array([np.cos(angle), np.sin(angle)]), uniforms[:2] * room
        if self.sideways:
            velocity, begin[1] = speed * np.array([np.sign(velocity[0]), 0.0]), room / 2
        straight = begin + np.asarray(frames)[:, None] * velocity  # (n, 2)
        folded = np.abs((straight + room) % (2 * room) - room)  # a wave between 0 and room: bouncing
        return np.rint(folded).astype(int)

    def name(self, index: int) -> str:
        return f"moving digits/{index}"

    def fingerprint(self) -> str:
        parts = (
            self._digits.fingerprint(),
            self.image_size,
            self.sideways,
            self.num_frames,
            self.motions,
            self.speed,
            self.seed,
        )
        return hash_lines(map(str, parts))
