"""Adaptive layer norm (DiT, arXiv 2212.09748): what a condition does to normalised activations."""

from __future__ import annotations

from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, all broadcastable to one another."""
    return x * (1 + scale) + shift
