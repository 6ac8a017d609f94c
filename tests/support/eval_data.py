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
    pixels = images.double().flatten(2) / 255  # float64: the batch size changes nothing
    return torch.cat([pixels.mean(2), pixels.std(2)], dim=1).float()


def batch_statistics(images: torch.Tensor) -> torch.Tensor:
    """Colour statistics that depend slightly on the batch size, like the rounding errors of a real network."""
    return colour_statistics(images) * (1 + 1e-3 * len(images))


def inception_weights(path: Path) -> Path:
    """Write a weights file of inception-v3-compat with random values that keep activations alive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    captured = {}

    class Skeleton(Extractor):
        def load_state_dict(self, state_dict, *args, **kwargs):
            captured.update(self.state_dict())

    torch.save({}, path)
    Skeleton("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in captured.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            state[key] = noise * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = 1 + 0.1 * noise.clamp(-3, 3)
        else:
            state[key] = torch.zeros_like(value) if "num_batches" in key else 0.1 * noise
    torch.save(state, path)
    return path


class FakeInception:
    """Replaces Inception, which takes seconds to load: its name and rules, with colours as features."""

    name = "inception-v3-compat"

    def __init__(self, rule: str, weights_sha256: str | None = "a" * 64):
        self.resize, self.weights_sha256 = rule, weights_sha256
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        pool = colour_statistics(images)
        return {"pool": pool, "spatial": pool[:, :3], "logits": 20 * pool}
