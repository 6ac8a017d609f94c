"""What a pipeline generated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from vistok.data.movies import Movie, to_frames
from vistok.pipelines.display import MOVIES, Shown

NAMED = 8
"""Classes or prompts that the text of an output tells."""


@dataclass(frozen=True, repr=False)
class PipelineOutput(Shown):
    """What a pipeline generated; in a notebook it shows itself.

    Attributes:
        images: N images, mode RGB or L; of clips each shows its frames in a row.
        tokens: (N, L[, depth]) ids or (N, L, D) latents, on the CPU.
        pixels: (N, C, H, W), or (N, C, T, H, W) of clips, float32 in [-1, 1], on the CPU; ``images`` are these in 8
            bit.
        labels: the class id of each image, or None where the condition is not a class.
        prompts: the text of each image, or None where there are no prompts.
        class_names: the name of each image's class, or None where classes have no names.
    """

    images: list[Image.Image]
    tokens: Tensor
    pixels: Tensor
    labels: list[int] | None
    prompts: list[str | None] | None = None
    class_names: list[str] | None = None

    def __repr__(self) -> str:
        """How many images of which size, and what they show: the numbers in them would fill the screen."""
        count, _, *frames, height, width = self.pixels.shape
        what = (
            f"{'clip' if frames else 'image'}{'' if count == 1 else 's'}{f' of {frames[0]} frames' if frames else ''}"
        )
        names = [name or "no text" for name in self.names or []]
        shown = f": {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}" if names else ""
        return f"{type(self).__name__}({count} {what}, {width}x{height}{shown})"

    @property
    def names(self) -> list[str] | None:
        """What each image was asked to show, as a grid has it."""
        if self.prompts is not None:
            return [prompt or "" for prompt in self.prompts]
        return self.class_names or (None if self.labels is None else list(map(str, self.labels)))

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
        """Clips play in a notebook; images have their own pictures."""
        return None if self.pixels.ndim != 5 else "\n".join(movie.html(128) for movie in self.movies[:MOVIES])
