"""The semantic loss of RobusTok (arXiv 2509.12474) and XQ-GAN (arXiv 2503.08354).

It contrasts the mean of an image's codes with the class feature of a frozen vision transformer for the same image;
the other images of the batch are the negatives, as in CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from vistok.losses.alignment import EncoderConfig, load_encoder
from vistok.utils.processes import group_size


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
        statistics = {"mean": mean or (0.485, 0.456, 0.406), "std": std or (0.229, 0.224, 0.225)}
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: EncoderConfig, patch_size: int | None = None) -> Self:
        """Build the pretrained transformer of ``config``; raises what ``load_encoder`` raises.

        Args:
            patch_size: side of its patches; None for the model's own. timm resamples the kernel to another size.
        """
        arguments: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
        encoder: Any = load_encoder(config, "losses.semantic_encoder.weights", **arguments)
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


def contrastive_loss(features: Tensor, partners: Tensor, scale: float = 1.0, normalise: bool = False) -> Tensor:
    """The symmetric contrastive loss (as in CLIP) over the batch of all processes, in nats.

    Args:
        features, partners: (B, D); row i of one belongs to row i of the other.
        scale: factor of the inner products.
        normalise: whether vectors are l2-normalised first.

    Raises:
        ValueError: the shapes differ.
    """
    if features.shape != partners.shape:
        raise ValueError(f"features {tuple(features.shape)} and partners {tuple(partners.shape)} differ in shape")
    features, partners = (_of_all_processes(values.float()) for values in (features, partners))
    if normalise:
        features, partners = F.normalize(features, dim=-1), F.normalize(partners, dim=-1)
    logits = scale * features @ partners.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _of_all_processes(values: Tensor) -> Tensor:
    """Gather the rows (W B, D) of all W processes, with gradients to the rows of each."""
    if group_size() == 1:
        return values
    import torch.distributed.nn.functional

    return torch.cat(distributed.nn.functional.all_gather(values))
