"""LPIPS, the learned perceptual distance (Zhang et al. 2018), on VGG16 features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vistok.losses.downloads import fetch_weights
from vistok.nn.containers import ModuleList

# Index in torchvision's vgg16().features, and channels, of each feature map that is compared.
TAPS = {"relu1_2": (3, 64), "relu2_2": (8, 128), "relu3_3": (15, 256), "relu4_3": (22, 512), "relu5_3": (29, 512)}
MIN_SIZE = 16  # four poolings leave one pixel

# From the names in released files to ours: VGG16 in the files of torchvision, richzhang/lpips and taming-transformers,
# and the linear heads (element 0 of a head is a dropout without weights).
_RENAMES = (
    (r"(?:net\.)?slice\d\.(\d+)\.(weight|bias)", r"features.\1.\2"),
    (r"lin(?:s\.)?(\d)\.model\.1\.weight", r"heads.\1.weight"),
    (r"scaling_layer\.(shift|scale)", r"\1"),
)


class LPIPS(nn.Module):
    """Perceptual distance of two images, one number per image. Frozen, but differentiable in the images.

    The squared difference of channel-normalised VGG16 features is weighted per channel by non-negative linear
    heads, averaged over space, and summed over five layers. There is no dropout, so training mode changes nothing.

    Args:
        weights: the state dict under our names (``features.*`` as in torchvision's VGG16, ``heads.*``, ``shift``,
            ``scale``). None leaves random features and uniform heads; use ``from_pretrained`` for the published
            distance.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.features = _vgg16_features()
        self.heads = ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for _, channels in TAPS.values())
        for head in self.heads:
            nn.init.constant_(head.weight, 1 / head.in_channels)
        # ImageNet's mean and deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        if weights is not None:
            from vistok.checkpoints import load_strictly

            load_strictly(self, {"shift": self.shift, "scale": self.scale} | dict(weights), source="LPIPS weights")

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build from a state dict of VGG16 LPIPS as richzhang/lpips or taming-transformers name it.

        Args:
            config: not needed: there is one VGG16 LPIPS.
            state_dict: VGG16 features and linear heads; VGG16's classifier is dropped.

        Raises:
            CheckpointError: keys or shapes do not fit.
        """
        return cls(_our_names(state_dict))

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, lin_weights: str | Path | None = None) -> Self:
        """Load the published weights from local files, or download them (528 MB, cached).

        Args:
            path: a file with all weights, or with torchvision's VGG16 weights only (``vgg16-397923af.pth``).
            lin_weights: a file with the linear heads (``vgg.pth`` of taming-transformers or richzhang/lpips).

        Raises:
            CheckpointError: a file is absent, damaged or of another model, or a download failed.
        """
        from vistok.checkpoints import read_weights, unwrap

        weights = _our_names(unwrap(read_weights(path)) if path else _download_vgg16())
        if lin_weights:
            weights |= _our_names(unwrap(read_weights(lin_weights)))
        elif not any(key.startswith("heads.") for key in weights):
            weights |= _our_names(_download_heads())
        return cls(weights)

    def taps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the five VGG16 feature maps by name ("relu1_2", ...) of images (B, 1 or 3, H, W) in [-1, 1].

        Raises:
            ValueError: images of another shape, or with a side below 16 px.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS needs images (batch, 1 or 3, H, W) with sides of at least {MIN_SIZE} px, "
                f"got {tuple(images.shape)}"
            )
        x = (images - self.shift) / self.scale  # a single channel becomes three here
        maps = {}
        names = {index: name for name, (index, _) in TAPS.items()}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in names:
                maps[names[index]] = x
        return maps

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the distance per image, (B,), of two batches (B, 1 or 3, H, W) in [-1, 1].

        Raises:
            ValueError: the shapes differ, or VGG16 cannot read them (see ``taps``).
        """
        if images.shape != target.shape:
            raise ValueError(f"images {tuple(images.shape)} and target {tuple(target.shape)} differ in shape")
        pairs = zip(self.taps(images).values(), self.taps(target).values())
        distances = [
            head((_normalise(a) - _normalise(b)).square()).mean(dim=(1, 2, 3))  # (B,)
            for head, (a, b) in zip(self.heads, pairs)
        ]
        return torch.stack(distances).sum(dim=0)


def _vgg16_features() -> nn.Sequential:
    """VGG16's convolutions up to relu5_3, numbered as in torchvision."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def _normalise(features: Tensor) -> Tensor:
    # Where all channels are zero, the gradient of vector_norm is zero; that of sqrt(sum of squares) would be NaN.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _our_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from vistok.checkpoints import rename

    kept = {key: tensor for key, tensor in state_dict.items() if not key.startswith("classifier.")}
    return rename(kept, _RENAMES)


def _download_vgg16() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    return _download(VGG16_Weights.IMAGENET1K_V1.url, "VGG16", "path=")


def _download_heads() -> dict[str, Tensor]:
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS

    return _download(URL_VGG16_LPIPS, "LPIPS head", "lin_weights=")


def _download(url: str, what: str, option: str) -> dict[str, Tensor]:
    return fetch_weights(
        url,
        what,
        "losses.lpips_weights=FILE in a config, --lpips-weights FILE on the command line, or "
        f"LPIPS.from_pretrained({option}FILE)",
    )
