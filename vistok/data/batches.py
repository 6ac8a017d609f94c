"""What readers hand over: the pixels of a batch, and what could not be read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Failures = dict[int, str]
"""Samples that could not be read: index to name and reason."""


class ImageBatch(NamedTuple):
    """Images or clips of one batch.

    Attributes:
        pixels: (B, C, H, W), or (B, C, T, H, W) of clips, float32 in [-1, 1].
        labels: (B,) int64; -1 where the source has no classes.
        indices: (B,) int64, positions in the source.
        target: what to reconstruct from the pixels, of their shape, where it is something else.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    target: Tensor | None = None
