"""What a pipeline generated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from vistok.data.movies import Movie, to_frames
from vistok.pipelines.display import MOVIES, Shown

NAMED = 8
"""The most classes or prompts that ``repr`` lists."""


@dataclass(frozen=True, repr=False)
class PipelineOutput(Shown):
    """What a pipeline generated; notebooks show its images.

    Attributes:
        images: N images, mode RGB or L; each clip is one image with its frames in a row.
        tokens: (N, L[, depth]) ids or (N, L, D) latents, on the CPU.
        pixels: (N, C, H, W), or (N, C, T, H, W) of clips, float32 in [-1, 1], on the CPU; ``images`` are these in 8
            bit.
        labels: the class id of each image (-1 without a class), or None where the condition is not a class.
        prompts: the text of each image, or None where there are no prompts.
        class_names: the name of each image's class (None without a class), or None where classes have no names.
    """

    images: list[Image.Image]
    tokens: Tensor
    pixels: Tensor
    labels: list[int] | None
    prompts: list[str | None] | None = None
    class_names: list[str | None] | None = None

    def __repr__(self) -> str:
        """Number, size and names of the images; their tensors would fill the screen."""
        count, _, *frames, height, width = self.pixels.shape
        what = (
            f"{'clip' if frames else 'image'}{'' if count == 1 else 's'}{f' of {frames[0]} frames' if frames else ''}"
        )
        names = [name or ("no class" if self.prompts is None else "no text") for name in self.names or []]
        shown = f": {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}" if names else ""
        return f"{type(self).__name__}({count} {what}, {width}x{height}{shown})"

    @property
    def names(self) -> list[str] | None:
        """The prompt, class name or class id of each image, for the labels of a grid; "" for one that has none."""
        named = self.class_names if self.prompts is None else self.prompts
        if named is not None:
            return [name or "" for name in named]
        return None if self.labels is None else [str(label) if label >= 0 else "" for label in self.labels]

    @property
    def videos(self) -> np.ndarray:
        """The clips, (N, T, H, W, C) uint8.

        Raises:
            ValueError: these are images.
        """
        if self.pixels.ndim != 5:
            raise ValueError("this pipeline generates images, which have no frames; they are in .images")
        return to_frames(self.pixels)

    @property
    def movies(self) -> list[Movie]:
        """The clips as movies, which play in a notebook and can be saved."""
        return [Movie(frames) for frames in self.videos]

    def _repr_html_(self) -> str | None:
        """Clips as players; None for images, which notebooks show by ``_repr_png_``."""
        return None if self.pixels.ndim != 5 else "\n".join(movie.html(128) for movie in self.movies[:MOVIES])
