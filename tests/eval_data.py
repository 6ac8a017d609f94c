"""Images and feature functions that tests of the evaluation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def smooth_images(count: int, *, seed: int, contrast: float = 40.0, brightness: float = 128.0, size: int = 24):
    """uint8 (N, H, W, 3) of coloured blobs."""
    rng = np.random.default_rng(seed)
    coarse = np.clip(rng.normal(brightness, contrast, (count, 6, 6, 3)), 0, 255).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in coarse]
    return np.stack(resized)


def write_folder(folder: Path, images: np.ndarray, extension: str = "png") -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:04d}.{extension}")
    return folder


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def colour_statistics(images: torch.Tensor) -> torch.Tensor:
    """A feature function: means and deviations per channel, (B, 6)."""
    pixels = images.double().flatten(2) / 255  # so exact that no batch size shows in float32
    return torch.cat([pixels.mean(2), pixels.std(2)], dim=1).float()


class FakeInception:
    """Stands for Inception where loading it would cost seconds: its name and rules, the colours as features."""

    name = "inception-v3-compat"

    def __init__(self, rule: str, weights_sha256: str | None = "a" * 64):
        self.resize, self.weights_sha256 = rule, weights_sha256
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        pool = colour_statistics(images)
        return {"pool": pool, "spatial": pool[:, :3], "logits": 20 * pool}
