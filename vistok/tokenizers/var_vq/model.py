"""VAR's image tokenizer: a convolutional autoencoder with multi-scale residual quantization of its map.

Paper: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (arXiv 2404.02905), section
3.2. Official weights: github.com/FoundationVision/VAR (MIT), which has no training code of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint
from vistok.draws import Draws
from vistok.nn.conv import ConvDecoder, ConvEncoder
from vistok.quantizers.multiscale import MultiScaleQuantizer, ScaleExpander
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.var_vq import official
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec
from vistok.utils.finite import finite_latents
from vistok.utils.sides import grid_of, image_sides


class VARVQ(Tokenizer):
    """Ids on growing grids: the first id describes the whole image, later grids code the residual of earlier ones.

    Tokens are (B, L), smallest scale first, in raster order inside a scale. The tokens of the first scales decode too.
    Other tokenizers can use its quantizer by the name "multi_scale".

    Args:
        image_size: side of the images, or (height, width).
        in_channels: 3, or 1 for grey images.
        channels: base width of encoder and decoder.
        channel_mult: width of each level, finest first, in units of ``channels``; the stride is 2 ** (levels - 1).
        res_blocks: residual blocks per level of the encoder; the decoder has one more.
        z_channels: channels of the map, and of a code.
        codebook_size: number of codes, which all scales share.
        scales: grids, smallest first, as sides of squares or (height, width); the last is that of the map.
        num_refiners: convolutions that refine what a scale adds, shared by neighbouring scales.
        refiner_share: weight of the convolution against the plain map; 0 leaves all refiners out.
        quant_conv_kernel: side of the convolutions before and after quantization, odd.
        cosine_codes: choose codes by cosine similarity instead of distance.
        codebook_restart_after: training steps after which an unused code is moved onto a residual; 0 turns this off.
        dropout: inside the residual blocks, in training.
        norm_groups: groups of all group norms; they must divide every width.

    Raises:
        ValueError: sides that are not multiples of the stride, scales that do not end at the map, an even kernel, or
            widths that norm_groups does not divide.
    """

    registry_name = "var_vq"
    tiny = {
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "z_channels": 4,
        "codebook_size": 32,
        "scales": (1, 2, 3, 4),
        "norm_groups": 4,
    }
    sizes = {
        "256": {},
        "512": {"image_size": 512, "scales": official.SCALES_512},
    }
    checkpoints = (OfficialCheckpoint("FoundationVision/var", "vae_ch160v4096z32.pth", official.config()),)

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        channels: int = 160,
        channel_mult: tuple[int, ...] = official.CHANNEL_MULT,
        res_blocks: int = 2,
        z_channels: int = 32,
        codebook_size: int = 4096,
        scales: tuple[int | tuple[int, int], ...] = official.SCALES_256,
        num_refiners: int = 4,
        refiner_share: float = 0.5,
        quant_conv_kernel: int = 3,
        cosine_codes: bool = False,
        codebook_restart_after: int = 0,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.stride = 2 ** (len(channel_mult) - 1)
        height, width = image_sides(image_size)
        self.grid = grid_of((height, width), self.stride)
        if quant_conv_kernel < 1 or quant_conv_kernel % 2 == 0:
            raise ValueError(f"quant_conv_kernel must be odd, so that maps keep their size; got {quant_conv_kernel}")
        self._input_shape = (in_channels, height, width)
        self.quantizer = MultiScaleQuantizer(
            codebook_size,
            z_channels,
            scales,
            num_refiners=num_refiners,
            refiner_share=refiner_share,
            cosine=cosine_codes,
            restart_after=codebook_restart_after,
        )
        if self.quantizer.scales[-1] != self.grid:
            raise ValueError(
                f"the scales end at {self.quantizer.scales[-1]}, but images of {height}x{width} have a map of "
                f"{self.grid}: the last scale must be the whole map"
            )
        options: dict[str, Any] = {"norm_groups": norm_groups, "dropout": dropout}
        kernel: dict[str, Any] = {"kernel_size": quant_conv_kernel, "padding": quant_conv_kernel // 2}
        self.encoder = ConvEncoder(in_channels, z_channels, channels, channel_mult, res_blocks, **options)
        self.pre_quant = nn.Conv2d(z_channels, z_channels, **kernel)
        self.post_quant = nn.Conv2d(z_channels, z_channels, **kernel)
        self.decoder = ConvDecoder(z_channels, in_channels, channels, channel_mult, res_blocks, **options)

    @property
    def spec(self) -> TokenSpec:
        scales = self.quantizer.scales
        return TokenSpec(sum(map(math.prod, scales)), self.quantizer.codebook_size, self.quantizer.dim, scales=scales)

    @property
    def raster_features(self) -> Mapping[str, int]:
        return {"latents": self.quantizer.dim, "decoded": self.decoder.conv_in.out_channels}

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to the map (B, D, h, w) before quantization."""
        self.check_pixels(pixels)
        return self.pre_quant(self.encoder(pixels))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.latents(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Ids (B, n) or code vectors (B, n, D), which smooth sampling returns, of the first scales or of all to pixels.

        Raises:
            ValueError: ids out of range, or tokens that end within a scale.
        """
        self.check_condition(condition)
        self.check_scaled(tokens)
        return self.decode_map(self.quantizer.decode(tokens))

    def decode_scales(self, tokens: Tensor) -> Tensor:
        """Tokens as in ``decode`` to images (S, B, C, H, W): from the first scale, from the first two, and so on."""
        self.check_scaled(tokens)
        return torch.stack([self.decode_map(so_far) for so_far in self.quantizer.maps(tokens)])

    def decode_map(self, quantized: Tensor) -> Tensor:
        """A quantized map (B, D, h, w) to pixels."""
        return self.decoder(self.post_quant(quantized))

    def expander(self) -> ScaleExpander:
        return ScaleExpander(self.quantizer)

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        self.check_condition(condition)
        latents = self.latents(pixels)
        quantized = self.quantizer(latents, draws=draws)
        mapped = self.post_quant(quantized.quantized)
        decoded = self.decoder.begin(mapped)
        maps = {"latents": latents, "quantized": quantized.quantized, "decoded": decoded}
        features = {name: rearrange(x, "b d h w -> b (h w) d") for name, x in maps.items()}
        reconstruction = self.decoder.finish(decoded, mapped)
        return TokenizerOutput(reconstruction, quantized.ids, quantized.losses, features)

    def encode_scales(self, pixels: Tensor, scales: Sequence[int | Sequence[int]]) -> Tensor:
        """Ids (B, L) with other grids than the tokenizer's own, of any image whose sides are multiples of the stride.

        Raises:
            ValueError: sides that are not multiples of the stride, or a last scale that is not the map's.
        """
        grid_of(pixels.shape[-2:], self.stride)
        return self.quantizer.encode(finite_latents(self.pre_quant(self.encoder(pixels))), scales)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(official.our_names(state_dict))
