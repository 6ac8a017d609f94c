"""DINOv2 as a feature network: the Frechet distance FD-DINOv2 of Stein et al. (arXiv 2306.04675).

The features are the class token after the final norm, of images resized to 224x224. The model of torch.hub and timm's
differ only in the resize of the position table, which changes the features. This module follows torch.hub, which the
paper's code uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import CheckpointError, read_weights
from vistok.eval.networks import full_precision
from vistok.eval.resize import Rule, resize
from vistok.utils.devices import choose_device
from vistok.utils.files import sha256
from vistok.utils.imagenet import MEAN, STD

DINOV2 = "dinov2-vit-l-14"
HUB_ID = "timm/vit_large_patch14_dinov2.lvd142m"
HEAD_DIM = 64  # of every DINOv2
_SIZES = {(384, 12): "s", (768, 12): "b", (1024, 24): "l"}


class DINOv2:
    """A DINOv2 vision transformer without registers; one call gives ``pool`` (B, D), the class token's features.

    Args:
        state_dict: in Meta's format (``dinov2_vitl14_pretrain.pth``) or timm's; the sizes are read from it.
        weights_sha256: of the file that the weights came from.
        device: where to compute.

    Raises:
        CheckpointError: the weights are not those of a DINOv2 without registers.
    """

    resize: Rule = "pil-bicubic-8bit"
    input_size = 224

    def __init__(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        weights_sha256: str | None = None,
        device: torch.device | str = "cpu",
    ):
        state = {key: tensor.float() for key, tensor in state_dict.items() if key != "mask_token"}
        try:
            dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
            depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
            state["pos_embed"] = resize_positions(state["pos_embed"], self.input_size // patch)
            self._network: Any = _build(dim, depth, patch, self.input_size)
            self._network.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"these are not weights of a DINOv2 without registers: {error}") from error
        self._network.eval().to(device)
        self.name = f"dinov2-vit-{_SIZES.get((dim, depth), f'{dim}x{depth}')}-{patch}"
        self.weights_sha256 = weights_sha256
        self.device = choose_device(device)
        self._mean, self._std = (torch.tensor(values, device=self.device).view(3, 1, 1) * 255 for values in (MEAN, STD))

    @classmethod
    def load(cls, weights: str | Path | None = None, *, device: torch.device | str = "cpu") -> DINOv2:
        """Read the weights from the file ``weights`` (torch or safetensors), or download those of ViT-L/14.

        Raises:
            CheckpointError: the file is absent, damaged or does not fit, or the download fails.
        """
        path = Path(weights) if weights is not None else _download()
        return cls(read_weights(path), weights_sha256=sha256(path), device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> {"pool": (B, D)}, float32 on ``device``."""
        pixels = resize(images, self.input_size, self.resize).to(self.device)
        with full_precision():
            tokens = self._network.forward_features((pixels - self._mean) / self._std)  # (B, 1 + patches, D), normed
        return {"pool": tokens[:, 0]}


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize a position table (1, 1 + n * n, D) to a grid of ``side`` x ``side``, as the model of torch.hub does.

    Bicubic without antialias, by the scale (side + 0.1) / n. timm antialiases, which gives other features.
    """
    class_position, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([class_position, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def _build(dim: int, depth: int, patch: int, image_size: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=max(1, dim // HEAD_DIM),
        init_values=1e-5,  # makes the layer scales exist; their values come from the file
        num_classes=0,
    )


def _download() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_ID, "model.safetensors"))
    except Exception as error:  # the client's errors have no common base class
        raise CheckpointError(
            f"the DINOv2 weights could not be fetched from the hub ({HUB_ID}): {error}. Fetch that file, or Meta's "
            "dinov2_vitl14_pretrain.pth, elsewhere and name it with weights=PATH (command line: --weights PATH)"
        ) from error
