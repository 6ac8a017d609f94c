"""What batch readers return: the pixels of a batch, and the samples that could not be read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Failures = dict[int, str]
"""Samples that could not be read: from the index to a text with name and reason."""


class ImageBatch(NamedTuple):
    """A batch of images or clips.

    Attributes:
        pixels: images (B, C, H, W) or clips (B, C, T, H, W), float32 in [-1, 1].
        labels: (B,) int64; -1 where the source has no classes.
        indices: (B,) int64, positions in the source.
        target: the pixels to reconstruct, in the shape of ``pixels``; None if these are ``pixels`` themselves.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    target: Tensor | None = None
