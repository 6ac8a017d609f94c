"""The semantic loss of RobusTok (arXiv 2509.12474) and XQ-GAN (arXiv 2503.08354).

It contrasts the mean of an image's codes with the class feature of a frozen vision transformer for the same image;
the other images of the batch are the negatives, as in CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.losses.alignment import EncoderConfig, load_encoder
from vistok.utils.imagenet import MEAN, STD


class SemanticGuide(nn.Module):
    """The class feature of a frozen vision transformer of timm; images are resized to the transformer's size.

    Args:
        encoder: the transformer; it is frozen and stays in evaluation mode.
        mean, std: for the normalisation of pixels in [0, 1]; ImageNet's if None.
    """

    encoder: Any  # timm's models do not declare their attributes
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        statistics = {"mean": mean or MEAN, "std": std or STD}
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: EncoderConfig, patch_size: int | None = None, *, option: str = "weights") -> Self:
        """Build the pretrained transformer of ``config``; raises what ``load_encoder`` raises.

        Args:
            patch_size: side of its patches; None for the model's own. timm resamples the kernel to another size.
            option: the config key of a local weights file, for messages.
        """
        arguments: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
        encoder: Any = load_encoder(config, option, **arguments)
        return cls(encoder, *(tuple(encoder.pretrained_cfg[key]) for key in ("mean", "std")))

    @property
    def dim(self) -> int:
        """Channels D of a feature."""
        return self.encoder.num_features

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to class features (B, D)."""
        size = tuple(self.encoder.patch_embed.img_size)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False)
        return self.encoder.forward_features(pixels)[:, 0]
