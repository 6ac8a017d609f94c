"""The feature networks for the distance between reconstructions and originals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.eval.clips import load_clip_network
from vistok.eval.networks import CallableNetwork, FeatureNetwork
from vistok.eval.protocols import choose_protocol, load_network
from vistok.losses import LPIPS
from vistok.losses.efficientnet import EfficientNetFeatures, packaged_weights
from vistok.utils.files import sha256

IMAGE_NETWORKS = ("efficientnet_lite0", "inception", "none")
CLIP_NETWORKS = ("i3d", "i3d_torchscript", "none")
SIDE = 224


class EfficientNetPool:
    """uint8 images (B, 3, H, W) -> EfficientNet-Lite0's features of stride 32, averaged over positions: (B, 320).

    Images are resized to ``side`` px, bicubic with antialiasing.
    """

    def __init__(self, weights: str | None, device: torch.device, side: int = SIDE):
        self.network = EfficientNetFeatures(32, weights).eval().requires_grad_(False).to(device)
        self.device, self.side = device, side

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device).float() / 255
        if tuple(pixels.shape[-2:]) != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.network.mean, self.network.std)
        )
        return self.network((pixels - mean) / std).mean(1)


def choose_network(name: str | None, *, clips: bool) -> str:
    """The network of this name; None stands for the default: EfficientNet-Lite0 for images, none for clips.

    Raises:
        ValueError: there is no such network of images, or of clips.
    """
    known = CLIP_NETWORKS if clips else IMAGE_NETWORKS
    if name is None:
        return "none" if clips else "efficientnet_lite0"
    if name not in known:
        raise ValueError(f"unknown network {name!r}; {'clips' if clips else 'images'} have {', '.join(known)}")
    return name


def image_network(name: str | None, weights: str | None, device: torch.device) -> FeatureNetwork | None:
    """The network of images of this name (see ``choose_network``), or None for "none".

    Raises:
        ValueError: the name is unknown.
        CheckpointError: its weights cannot be loaded; the message says how to get them.
    """
    name = choose_network(name, clips=False)
    if name == "none":
        return None
    if name == "inception":
        return load_network(choose_protocol("reconstruction", None, None), weights=weights, device=device)
    file = weights or packaged_weights()
    return CallableNetwork(EfficientNetPool(weights, device), "efficientnet-lite0, pooled", sha256(file))


def clip_network(name: str | None, weights: str | None, device: torch.device) -> Any:
    """The network of clips by its name; see ``image_network``. "i3d_torchscript" runs the code in its file."""
    name = choose_network(name, clips=True)
    if name == "none":
        return None
    return load_clip_network(weights, torchscript=name == "i3d_torchscript", device=device)


def lpips(weights: str | None, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    return None if weights is None else LPIPS.from_pretrained(weights).to(device)
