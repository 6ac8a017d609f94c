"""Display of pipelines and their outputs, in notebooks and at a Python prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from vistok.data.sheets import LEAST, enlarged, sheet
from vistok.types import TokenSpec
from vistok.utils.devices import dtype_of

if TYPE_CHECKING:
    from vistok.pipelines.generation import Pipeline

MOST_COLUMNS = 16
"""The most classes that get a column each."""
MOST_SHOWN = 64
"""The most images of an output that a notebook shows."""
MOVIES = 8
"""The most clips of an output that a notebook plays."""


class Shown:
    """Base of outputs that have ``images``; shows them as a grid, labelled by ``names``."""

    images: list[Image.Image] | None

    @property
    def names(self) -> list[str] | None:
        """The class or prompt of each image; None if there are none."""
        return None

    def grid(self, scale: float | None = None, columns: int | None = None) -> Image.Image:
        """The images side by side, named where they have classes or prompts.

        Args:
            scale: pixels of the grid for each pixel of an image; None enlarges small ones by a whole factor.
            columns: images per row; None gives each class a column if there are few, else makes a square.

        Raises:
            ValueError: there are no images, or ``scale`` is not above 0.
        """
        images = self.images or []
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        if scale is None:
            return overview(images, self.names or (), columns=columns)
        if scale == int(scale):
            resized = [enlarged(image, int(scale)) for image in images]
        else:
            resized = [image.resize([max(1, round(side * scale)) for side in image.size]) for image in images]
        return overview(resized, self.names or (), columns=columns, least=1)

    def _repr_png_(self) -> bytes | None:
        """The grid of the first images, for notebooks."""
        if not self.images:
            return None
        buffer = io.BytesIO()
        overview(self.images[:MOST_SHOWN], self.names or ()).save(buffer, format="PNG")
        return buffer.getvalue()


def overview(
    images: Sequence[Image.Image],
    labels: Sequence[str] = (),
    *,
    columns: int | None = None,
    clips: bool = False,
    least: int = LEAST,
) -> Image.Image:
    """Arrange samples in a grid: a column for each class or prompt if there are few, else a label below each image.

    Args:
        labels: of the images, in order; surplus ones are ignored.
        columns: images per row; None chooses by the labels.
        clips: whether each image is a row of frames; these rows are stacked.
        least: as in ``sheet``.
    """
    labels = labels[: len(images)]
    turns = len(set(labels))
    if clips:
        return sheet(images, 1, row_labels=labels, least=least)
    # Each class gets a column if classes alternate (0 1 0 1) or come in runs of equal length (0 0 1 1).
    runs = len(images) // turns if turns and len(images) % turns == 0 else 0
    if columns is None and 1 < turns <= MOST_COLUMNS:
        if all(label == labels[index % turns] for index, label in enumerate(labels)):
            return sheet(images, turns, column_labels=labels[:turns], least=least)
        if runs and all(label == labels[index - index % runs] for index, label in enumerate(labels)):
            order = [run * runs + row for row in range(runs) for run in range(turns)]
            return sheet([images[index] for index in order], turns, column_labels=labels[::runs], least=least)
    return sheet(images, columns, labels=labels, least=least)


def describe(pipe: Pipeline) -> str:
    """What a pipeline is made of: parts, sizes, classes, defaults."""
    tokenizer, generator = pipe.tokenizer, pipe.generator
    lines = {
        "tokenizer": f"{tokenizer.registry_name}, {_size(tokenizer)}, {_pixels(tokenizer.input_shape)} to "
        f"{describe_tokens(tokenizer.spec)}",
        "generator": f"{generator.registry_name}, {_size(generator)}, {_takes(pipe)}",
    }
    if pipe.text.parts:
        lines["text"] = ", ".join(str(name) for name in pipe.text.identities)
    lines["sampling"] = ", ".join(f"{name}={value!r}" for name, value in pipe.sampling.items()) or "defaults"
    lines["on"] = f"{pipe.device}, {dtype_of(generator)}"
    return "\n".join(["Pipeline(", *(f"  {name}: {text}" for name, text in lines.items()), ")"])


def describe_tokens(spec: TokenSpec) -> str:
    """Tokens in words: "4x4 tokens of 512 codes"."""
    places = "x".join(map(str, spec.grid)) if spec.grid else f"{spec.length:,}"
    kind = f"tokens of {spec.codebook_size:,} codes" if spec.discrete else f"vectors of {spec.dim} channels"
    levels = f", {spec.depth} codes each" if spec.depth > 1 else ""
    order = ", ordered from coarse to fine" if spec.prefix_step is not None else ""
    scales = f" in {len(spec.scales)} scales" if spec.scales else ""
    return f"{places} {kind}{levels}{scales}{order}"


def _size(model: Any) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name} parameters"
    return f"{count} parameters"


def _pixels(shape: Sequence[int]) -> str:
    channels, *sides = shape
    what = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    clips = f" clips of {sides[0]} frames" if len(sides) == 3 else " images"
    return f"{what} {'x'.join(map(str, sides[-2:]))}{clips}"


def _takes(pipe: Pipeline) -> str:
    """What the generator is conditioned on."""
    spec, names = pipe.generator.condition_spec, pipe.class_names
    taken = []
    if spec.num_classes:
        shown = [name.split(",")[0] for name in names[:5]] + ["…"] * (len(names) > 5)
        taken.append(f"{spec.num_classes:,} classes" + (f" ({', '.join(shown)})" if shown else ""))
    taken += ["texts"] * (spec.features is not None or (spec.ids is not None and not spec.num_classes))
    taken += ["given tokens"] * (spec.given is not None and not taken)
    return " and ".join(taken) or "unconditional"
