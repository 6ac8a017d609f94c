"""Random images, and folders of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(number: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """A random image (size is width, height)."""
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def fill_folder(root: Path, classes: dict[str, int], extension: str = "png") -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(number).save(root / name / f"{number:03d}.{extension}")
    return root


def assert_same_batches(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        # Batches without targets have None for them.
        assert all(a is b or torch.equal(a, b) for a, b in zip(one, other))
