"""The resize rules that feature networks are defined with, as products with interpolation matrices.

A separable resize is linear in the pixels, so one matrix for the rows and one for the columns define the whole rule.
Two matrix products are several times as fast as gathering neighbours, and rules differ in their matrices only. The
choice of the rule matters: antialiasing or a shift by half a pixel changes FID by more than papers differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Rule = Literal["tf1-bilinear", "pil-bicubic-float", "pil-bicubic-8bit"]


def tf1_bilinear_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32: TensorFlow 1's ResizeBilinear, the rule inside the 2015 Inception graph.

    No antialias, no half-pixel shift: output i lies at i * source / target, computed in float32 as in TensorFlow.
    """
    positions = np.arange(target, dtype=np.float32) * np.float32(source / target)
    lower = np.floor(positions).astype(np.int64)
    fraction = positions - lower.astype(np.float32)
    matrix = np.zeros((target, source), dtype=np.float32)
    rows = np.arange(target)
    np.add.at(matrix, (rows, lower), 1 - fraction)
    np.add.at(matrix, (rows, np.minimum(lower + 1, source - 1)), fraction)
    return matrix


def pil_bicubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32: Pillow's BICUBIC (a = -0.5), whose kernel widens when it shrinks images (antialias).

    This is the rule of clean-fid (Parmar et al., arXiv 2104.11222).
    """
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale  # (target,)
    columns = np.arange(source)
    first = np.maximum((centres - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + 2 * stretch + 0.5).astype(np.int64), source)
    weights = _cubic((columns - centres[:, None] + 0.5) / stretch)
    weights *= (columns >= first[:, None]) & (columns < last[:, None])
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


_MATRICES: dict[str, Callable[[int, int], np.ndarray]] = {
    "tf1-bilinear": tf1_bilinear_matrix,
    "pil-bicubic-float": pil_bicubic_matrix,
}


def resize(images: Tensor, size: int, rule: Rule) -> Tensor:
    """Resize 8-bit images (B, C, H, W) to float32 (B, C, size, size) in 0..255, on the images' device.

    - ``tf1-bilinear``: the rule of the Inception graph, in ADM's suite and in torch-fidelity.
    - ``pil-bicubic-float``: clean-fid's rule: bicubic with antialias in float, clipped, not rounded.
    - ``pil-bicubic-8bit``: dgm-eval's rule: Pillow's BICUBIC on 8-bit images, with rounded values.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule == "pil-bicubic-8bit":
        return _resize_with_pillow(images, size)
    if rule not in _MATRICES:
        raise ValueError(f"unknown resize rule {rule!r}; known: {', '.join(get_args(Rule))}")
    height, width = images.shape[-2:]
    resized = images.float()
    if width != size:
        resized = resized @ _matrix(rule, width, size).to(resized.device).T
    if height != size:
        resized = _matrix(rule, height, size).to(resized.device) @ resized
    return resized.clamp(0, 255) if rule == "pil-bicubic-float" else resized


@lru_cache(maxsize=16)
def _matrix(rule: str, source: int, target: int) -> Tensor:
    return torch.from_numpy(_MATRICES[rule](source, target))


def _resize_with_pillow(images: Tensor, size: int) -> Tensor:
    from PIL import Image

    if images.shape[-2:] == (size, size):
        return images.float()
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
    resized = [np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC)) for array in arrays]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().to(images.device)
