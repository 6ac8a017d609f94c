"""A distance of two images by a classifier's logits (the perceptual loss of TiTok, arXiv 2406.07550)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.losses.downloads import fetch_weights
from vistok.utils.imagenet import MEAN, STD

SIDE = 224


class ClassifierDistance(nn.Module):
    """Mean squared difference of the logits of a frozen ImageNet classifier, by default ConvNeXt-S.

    Images are resized to 224 px, bilinear with antialiasing, and normalised. It is differentiable in the images.

    Args:
        classifier: maps normalised images (B, 3, 224, 224) to logits (B, K). None is a ConvNeXt-S with random weights;
            use ``from_pretrained`` for the published distance.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module | None = None):
        super().__init__()
        self.classifier = (_convnext() if classifier is None else classifier).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> Self:
        """The distance of ConvNeXt-S with torchvision's ImageNet weights, from a local file or a download (192 MB,
        cached).

        Raises:
            CheckpointError: the file is absent, damaged or of another model, or the download failed.
        """
        from vistok.checkpoints import load_strictly, read_weights, unwrap

        model = _convnext()
        load_strictly(model, unwrap(read_weights(path)) if path else _download(), source=str(path or "the download"))
        return cls(model)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def logits(self, images: Tensor) -> Tensor:
        """The logits (B, K) of images (B, 1 or 3, H, W) in [-1, 1]."""
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.classifier(((images + 1) / 2 - self.mean) / self.std)  # a single channel becomes three here

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distances (B,) of two batches (B, 1 or 3, H, W) in [-1, 1].

        Raises:
            ValueError: the shapes differ.
        """
        if images.shape != target.shape:
            raise ValueError(f"images {tuple(images.shape)} and target {tuple(target.shape)} differ in shape")
        return (self.logits(images) - self.logits(target)).square().mean(1)


def _convnext() -> nn.Module:
    from torchvision.models import convnext_small

    return convnext_small()


def _download() -> dict[str, Tensor]:
    from torchvision.models import ConvNeXt_Small_Weights

    remedy = "losses.classifier.weights=FILE in a config, or ClassifierDistance.from_pretrained(FILE)"
    return fetch_weights(ConvNeXt_Small_Weights.IMAGENET1K_V1.url, "ConvNeXt-S", remedy)
