"""Whether images or clips look the same. A re-encoded copy has other bytes, but nearly the same pixels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from vistok.data.clip_sources import ClipSource
from vistok.data.decoding import DECODING_ERRORS, ImageDecoder, open_image
from vistok.data.sources import FileSource, ImageSource, Selection, UnreadableImageError
from vistok.data.videos import DecoderMissingError, UnreadableClipError

SIDE = 16
"""Pixels on each side of a thumbnail."""
DECODED_SIDE = 64
"""The size to which JPEG files are decoded; a larger one would cost time for nothing."""
MOST_DIFFERENCE = 2.0
"""The largest mean difference, in grey levels of 0..255, between the thumbnails of two copies. A JPEG of quality 50
stays below it."""
LEAST_CONTRAST = 8.0
"""The least standard deviation of a thumbnail, in grey levels. Flatter ones are too much alike to prove anything."""


def thumbnails(source: ImageSource | ClipSource, indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Grey thumbnails of samples, by index, as float32: (SIDE * SIDE,) of an image, (2 * SIDE * SIDE,) of two frames of
    a clip.

    Samples that cannot be read, or that are nearly of one colour, are left out.
    """
    found = {}
    for index in indices:
        try:
            images = _frames(source, index) if isinstance(source, ClipSource) else [_image(source, index)]
        except (UnreadableImageError, UnreadableClipError, DecoderMissingError, *DECODING_ERRORS):
            continue  # the loader names it
        values = np.concatenate([_thumbnail(image) for image in images])
        if values.std() >= LEAST_CONTRAST:
            found[index] = values
    return found


def lookalikes(looked: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> dict[int, int]:
    """The index of the most similar one of ``others``, as it is or mirrored, for each of ``looked``; those that
    resemble none are left out."""
    keys, rows = list(others), np.array(list(others.values()))
    found = {}
    for index, values in looked.items() if keys else ():
        mirrored = values.reshape(-1, SIDE, SIDE)[..., ::-1].ravel()
        differences = np.minimum(*(np.abs(rows - view).mean(1) for view in (values, mirrored)))
        nearest = int(differences.argmin())
        if differences[nearest] <= MOST_DIFFERENCE:
            found[index] = keys[nearest]
    return found


def _image(source: ImageSource, index: int) -> Image.Image:
    whole, place = source, index
    if isinstance(source, Selection):
        whole, place = source.source, source.indices[index]
    if not isinstance(whole, FileSource):
        return source[index][0]
    with whole.files.open(place) as file, open_image(file) as image:
        image.draft(None, (DECODED_SIDE, DECODED_SIDE))
        return ImageDecoder(1).convert(image)


def _frames(source: ClipSource, index: int) -> list[Image.Image]:
    frames = source.read(index, [0, source.length(index) // 2])
    return [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in frames]


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()
