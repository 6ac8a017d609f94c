"""A vision transformer over the patches of a clip as a discriminator, with one logit per clip.

LARP (arXiv 2410.21264), github.com/hywang66/LARP (MIT).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from vistok.losses.discriminators import Discriminator
from vistok.nn.initialisation import xavier_uniform
from vistok.nn.positions import FixedClipPositions
from vistok.nn.vit import ViTBlock
from vistok.utils.sides import image_sides


class ViTDiscriminator(Discriminator):
    """Patches with fixed positions and a class token, transformer blocks, and a linear layer on the class token.

    Args:
        num_frames, image_size: of the clips; the size is a side, or (height, width).
        temporal_patch_size, patch_size: frames and side of a patch.
        dim, num_layers, num_heads: of the transformer.
        in_channels: of the clips.
        spectral_norm: divides the weights of all linear and convolution layers by their largest singular value.
        norm_eps: eps of the blocks' LayerNorms.

    Raises:
        ValueError: the sizes are not multiples of the patches.
    """

    def __init__(
        self,
        num_frames: int,
        image_size: int | tuple[int, int],
        temporal_patch_size: int = 4,
        patch_size: int = 8,
        dim: int = 384,
        num_layers: int = 12,
        num_heads: int = 8,
        in_channels: int = 3,
        spectral_norm: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        height, width = image_sides(image_size)
        sides, patch = (num_frames, height, width), (temporal_patch_size, patch_size, patch_size)
        if any(side % size for side, size in zip(sides, patch)):
            raise ValueError(f"clips of {sides} (frames, height, width) are no multiple of patches of {patch}")
        grid = num_frames // temporal_patch_size, height // patch_size, width // patch_size
        self.in_channels, self.input_shape = in_channels, (in_channels, *sides)
        self.to_patches = nn.Conv3d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = FixedClipPositions(grid, dim)
        self.blocks = nn.Sequential(
            *(ViTBlock(dim, num_heads, eps=norm_eps, qkv_bias=False) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, 1)
        self.apply(xavier_uniform)
        nn.init.xavier_uniform_(self.class_token)
        if spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, nn.Linear | nn.Conv3d):
                    parametrizations.spectral_norm(module)

    @classmethod
    def arguments_for(cls, input_shape: tuple[int, ...]) -> dict[str, Any]:
        channels, *frames, height, width = input_shape
        return {"in_channels": channels, "num_frames": frames[0] if frames else 1, "image_size": (height, width)}

    def forward(self, clips: Tensor) -> Tensor:
        """Return one logit per clip, (B,), from clips (B, C, T, H, W).

        Raises:
            ValueError: clips of another shape.
        """
        if tuple(clips.shape[1:]) != self.input_shape:
            raise ValueError(
                f"clips must be (B, {', '.join(map(str, self.input_shape))}), channels before frames, got "
                f"{tuple(clips.shape)}"
            )
        patches = self.to_patches(clips)  # (B, D, t, h, w)
        patches = patches.flatten(2).transpose(1, 2) + self.positions(patches.shape[2])
        x = torch.cat([self.class_token.expand(len(clips), -1, -1), patches], 1)  # (B, 1 + t * h * w, D)
        return self.output(self.norm(self.blocks(x)[:, 0])).squeeze(1)
