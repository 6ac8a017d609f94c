"""RobusTok: a raster of 16x16 codes between two DINOv2 transformers, trained to tolerate errors of the generator.

Papers: Image Tokenizer Needs Post-Training (arXiv 2509.12474) and Robust Latent Matters (arXiv 2503.08354). Official
weights and conventions: github.com/qiuk2/RobusTok.

The perturbation of latents is an option of every vector quantizer (``vistok.quantizers.perturbation``), and
post-training is a task for every tokenizer. This module holds RobusTok's network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, load_strictly, rename
from vistok.draws import Draws
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.robustok import official
from vistok.tokenizers.robustok.networks import Decoder, Encoder, ViTBackbone
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec
from vistok.utils.sides import image_sides


class RobusTok(Tokenizer):
    """Tokens on a square raster; encoder and decoder are vision transformers of one size.

    Args:
        image_size: side of the images, or (height, width).
        in_channels: 3, or 1 for grey images.
        patch_size: side of a patch; the image sides must be multiples of it.
        dim, num_layers, num_heads: of both transformers.
        num_tokens: tokens of an image, a square number.
        codebook_size: number of codes.
        codebook_embed_dim: channels of a code.
        codebook_l2_norm: compare and decode l2-normalised codes.
        codebook_restart_after: training steps after which an unused code is moved onto a latent; 0 turns this off.
        drop_path: share of samples whose branches are dropped in the last block in training, rising linearly from 0.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: a size that patches do not divide, or a number of tokens that is no square.
    """

    registry_name = "robustok"
    tiny = {
        "image_size": 16,
        "patch_size": 4,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_tokens": 16,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "drop_path": 0.0,
    }
    sizes = {"base": official.BACKBONES[official.BASE]}
    checkpoints = tuple(
        OfficialCheckpoint("qiuk6/RobusTok", name, official.RELEASED) for name in ("main-train.pt", "post-train.pt")
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        patch_size: int = 16,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_tokens: int = 256,
        codebook_size: int = 4096,
        codebook_embed_dim: int = 64,
        codebook_l2_norm: bool = True,
        codebook_restart_after: int = 0,
        drop_path: float = 0.1,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        height, width = image_sides(image_size)
        if height % patch_size or width % patch_size:
            raise ValueError(f"image_size {height}x{width} is not a multiple of patch_size {patch_size}")
        side = math.isqrt(num_tokens)
        if side < 1 or side * side != num_tokens:
            raise ValueError(f"num_tokens must be a square number, for a square raster; got {num_tokens}")
        self._input_shape = (in_channels, height, width)
        grid = (height // patch_size, width // patch_size)
        backbones = [ViTBackbone(dim, num_layers, num_heads, grid, drop_path) for _ in range(2)]
        self.encoder = Encoder(backbones[0], dim, patch_size, in_channels, num_tokens)
        self.decoder = Decoder(backbones[1], dim, patch_size, in_channels)
        self.pre_quant = nn.Linear(dim, codebook_embed_dim)
        self.post_quant = nn.Linear(codebook_embed_dim, dim)
        self.quantizer = chosen_quantizer(
            quantizer,
            codebook_embed_dim,
            lambda: VectorQuantizer(
                codebook_size,
                codebook_embed_dim,
                normalize=codebook_l2_norm,
                gradient="normalised",
                init="uniform",
                restart_after=codebook_restart_after,
            ),
        )
        plain = TokenSpec(num_tokens, self.quantizer.codebook_size, codebook_embed_dim, grid=(side, side))
        self._spec = spec_of(self.quantizer, plain)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.to_pixels.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to latents (B, N, code dim), before quantization."""
        self.check_pixels(pixels)
        return self.pre_quant(self.encoder(pixels))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.latents(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Ids (B, N), or multi-scale ids (see ``dequantize``), to pixels (B, C, H, W).

        Raises:
            ValueError: ids out of range, or not N of them.
        """
        self.check_condition(condition)
        return self.decode_latents(self.dequantize(tokens))

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Codes (B, N, code dim) to pixels (B, C, H, W)."""
        return self.decoder(self.post_quant(quantized))

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """Features "latents", "quantized" (B, N, code dim)."""
        self.check_condition(condition)
        latents = self.latents(pixels)
        quantized = self.quantizer(latents, draws=draws)
        features = {"latents": latents, "quantized": quantized.quantized}
        return TokenizerOutput(self.decode_latents(quantized.quantized), quantized.ids, quantized.losses, features)

    @property
    def semantic_dim(self) -> int:
        return self.pre_quant.in_features

    def project_semantic(self, features: Tensor) -> Tensor:
        """Project features (B, D) of a frozen transformer of the encoder's width to (B, code dim), with the layer that
        projects the latents. The semantic loss compares them with the mean of the quantized latents.
        """
        return self.pre_quant(features)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(official.our_names(state_dict))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the frozen guide of the semantic loss, and counters."""
        return {key: tensor for key, tensor in state.items() if not key.startswith(official.TRAINING_ONLY)}


def from_backbone(backbone: Any, **arguments: Any) -> RobusTok:
    """A new tokenizer whose encoder and decoder start with the weights of a vision transformer of timm.

    Args:
        backbone: for example ``timm.create_model("vit_base_patch14_dinov2.lvd142m", pretrained=True, img_size=256,
            patch_size=16, num_classes=0)``, which resamples patches and positions.
        arguments: further arguments of ``RobusTok``, which override the sizes of the backbone.

    Raises:
        CheckpointError: weights that do not fit, of another kind of transformer.
        ValueError: arguments that do not fit.
    """
    size: dict[str, Any] = {
        "dim": backbone.embed_dim,
        "num_layers": len(backbone.blocks),
        "num_heads": backbone.blocks[0].attn.num_heads,
        "patch_size": backbone.patch_embed.patch_size[0],
        "image_size": tuple(backbone.patch_embed.img_size),
    }
    model = RobusTok(**size | arguments)
    own = model.state_dict()
    with torch.no_grad():
        for part in ("encoder", "decoder"):
            state = {
                f"{part}.model.{key}": value
                for key, value in backbone.state_dict().items()
                if part == "encoder" or not key.startswith("patch_embed.")
            }
            own |= rename(state, official.OFFICIAL_NAMES)
    load_strictly(model, own, source=type(backbone).__name__)
    return model
