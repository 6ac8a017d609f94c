"""GigaTok: tokenizers of convolutions and transformers that scale to 3 billion parameters.

Paper: GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters for Autoregressive Image Generation (Xiong et al.,
arXiv 2504.08736, ICCV 2025). Official weights and conventions: github.com/SilentView/GigaTok (MIT). A layer of the
decoder is aligned with a frozen image encoder in training, which keeps the tokens of large models easy to predict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws
from vistok.nn.alignment import AlignmentConfig
from vistok.nn.conv import ConvDecoder, ConvEncoder, UpsampleKind
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.quantizers.vq import Gradient
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.gigatok import official
from vistok.tokenizers.gigatok.networks import (
    GridDecoder,
    GridEncoder,
    LayerKind,
    QueryDecoder,
    QueryEncoder,
    QueryInit,
    TransformerSize,
    initialise,
)
from vistok.types import MAIN, Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.sides import grid_of, image_sides

CHANNEL_MULT = (1, 1, 2, 2, 4)
ALIGNMENT = AlignmentConfig()
Layout = Literal["1d", "2d"]


SMALL, BASE, LARGE, XL, XXL = (
    TransformerSize(*official.SIZES[name]) for name in ("small", "base", "large", "xl", "xxl")
)


def _size(encoder: TransformerSize, decoder: TransformerSize) -> dict[str, Any]:
    return {"encoder_size": encoder, "decoder_size": decoder}


PLAIN_2D = {"layout": "2d", "layer_kind": "self_attention"}


class GigaTok(Tokenizer):
    """Images to a sequence (layout "1d") or a raster (layout "2d") of ids.

    Convolutions compute a feature map of the image, and a transformer computes tokens from the map. The decoder mirrors
    both. The loss term "feature" compares its feature map with the encoder's.

    Args:
        image_size: side of the images, or (height, width), multiples of the stride 2 ** (levels - 1). Positions are
            learned for this size only.
        in_channels: 3, or 1 for grey images.
        layout: "1d", a sequence of tokens, to and from the map by queries; "2d", a token per cell of the map.
        num_tokens: tokens of layout "1d", a power of two if ``query_init`` is "pooled"; unused in layout "2d".
        encoder_size, decoder_size: the transformers.
        layer_kind: "cross_attention", which layout "1d" needs, or "self_attention".
        query_init: initial values of the encoder's queries in layout "1d": "pooled", averages over ever finer blocks of
            the map, or its "mean".
        channels: base width of the convolutional stacks.
        encoder_channel_mult, decoder_channel_mult: width of each level, finest first, in units of ``channels``.
        res_blocks: residual blocks per level of the convolutional encoder; the decoder has one more.
        z_channels: channels of the feature map and of tokens around the codes.
        conv_attention: attention in the deepest convolutional level and in the middle.
        adaptive_norm: see ``ConvDecoder``.
        upsample: see ``ConvDecoder``.
        codebook_size, codebook_embed_dim: number and channels of the codes.
        codebook_l2_norm: compare and decode l2-normalised codes.
        codebook_restart_after: training steps after which an unused code is moved onto a latent; 0 turns this off.
        quantizer_gradient: see ``VectorQuantizer``.
        entropy_temperature: temperature of the "entropy" loss term (0.01 in the paper); None leaves the term out.
        direct_until: before this training step, the convolutional decoder also decodes the encoder's map. The result is
            the reconstruction "direct", to which pixel losses apply as to the main one.
        alignment: head for the "repa" loss, on layer ``layer`` (counted from 1) of the decoder's transformer. Defaults:
            layer 3, 768 channels as in DINOv2-B, four times the decoder's width inside. None has no head.
        dropout: inside the residual blocks, in training.
        norm_groups: groups of all group norms; they must divide every width.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: sizes that do not divide, an unknown layout, or "1d" without cross-attention.
    """

    registry_name = "gigatok"
    encoding_parts = ("token_encoder.*", *Tokenizer.encoding_parts)
    tiny = {
        "image_size": 16,
        "num_tokens": 8,
        "encoder_size": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "decoder_size": {"dim": 24, "num_layers": 2, "num_heads": 2},
        "alignment": {"dim": 12, "layer": 1},
        "channels": 8,
        "encoder_channel_mult": (1, 1, 2),
        "decoder_channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "z_channels": 32,
        "codebook_size": 32,
        "codebook_embed_dim": 8,
        "norm_groups": 4,
    }
    sizes = {
        "ss": _size(SMALL, SMALL),
        "sb": _size(SMALL, BASE),
        "bl": _size(BASE, LARGE),
        "xlxxl": _size(XL, XXL),
        "ss_2d": _size(SMALL, SMALL) | PLAIN_2D,
        "sb_2d": _size(SMALL, BASE) | PLAIN_2D,
        "bl_2d": _size(BASE, LARGE) | PLAIN_2D,
    }
    checkpoints = official.CHECKPOINTS

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        layout: Layout = "1d",
        num_tokens: int = 256,
        encoder_size: TransformerSize = SMALL,
        decoder_size: TransformerSize = SMALL,
        layer_kind: LayerKind = "cross_attention",
        query_init: QueryInit = "pooled",
        channels: int = 128,
        encoder_channel_mult: tuple[int, ...] = CHANNEL_MULT,
        decoder_channel_mult: tuple[int, ...] = CHANNEL_MULT,
        res_blocks: int = 2,
        z_channels: int = 256,
        conv_attention: bool = False,
        adaptive_norm: bool = True,
        upsample: UpsampleKind = "depth_to_space",
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        codebook_restart_after: int = 0,
        quantizer_gradient: Gradient = "rotation",
        entropy_temperature: float | None = None,
        direct_until: int = 0,
        alignment: AlignmentConfig | None = ALIGNMENT,
        dropout: float = 0.0,
        norm_groups: int = 32,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be '1d' or '2d', got {layout!r}")
        if layout == "1d" and layer_kind != "cross_attention":
            raise ValueError(
                f"layout '1d' reads the map by cross-attention, layer_kind {layer_kind!r} cannot; take layout '2d'"
            )
        if len(encoder_channel_mult) != len(decoder_channel_mult):
            raise ValueError(
                f"the encoder has {len(encoder_channel_mult)} levels and the decoder {len(decoder_channel_mult)}; "
                "images come back at their own size only if both have as many"
            )
        height, width = image_sides(image_size)
        self._input_shape = (in_channels, height, width)
        self.map_grid = grid_of((height, width), 2 ** (len(encoder_channel_mult) - 1))
        num_tokens = num_tokens if layout == "1d" else math.prod(self.map_grid)
        grid = None if layout == "1d" else self.map_grid
        encoder_size, decoder_size = (as_dataclass(TransformerSize, size) for size in (encoder_size, decoder_size))
        self.direct_until, self.layout = direct_until, layout
        self.alignment = AlignmentConfig.filled(alignment, dim=768, layer=3, hidden_dim=4 * decoder_size.dim)

        options: dict[str, Any] = {"norm_groups": norm_groups, "dropout": dropout, "attend": conv_attention}
        self.encoder = ConvEncoder(in_channels, z_channels, channels, encoder_channel_mult, res_blocks, **options)
        self.decoder = ConvDecoder(
            z_channels,
            in_channels,
            channels,
            decoder_channel_mult,
            res_blocks,
            upsample=upsample,
            adaptive_norm=adaptive_norm,
            **options,
        )
        self.encoder.apply(initialise)
        self.decoder.apply(initialise)
        around = (z_channels, self.map_grid)
        self.token_encoder: QueryEncoder | GridEncoder
        self.token_decoder: QueryDecoder | GridDecoder
        if layout == "1d":
            self.token_encoder = QueryEncoder(*around, num_tokens, encoder_size, query_init)
            self.token_decoder = QueryDecoder(*around, num_tokens, decoder_size, self.alignment)
        else:
            self.token_encoder = GridEncoder(*around, encoder_size, layer_kind)
            self.token_decoder = GridDecoder(*around, decoder_size, layer_kind, self.alignment)
        self.pre_quant = nn.Linear(z_channels, codebook_embed_dim)
        self.quantizer = chosen_quantizer(
            quantizer,
            codebook_embed_dim,
            lambda: VectorQuantizer(
                codebook_size,
                codebook_embed_dim,
                normalize=codebook_l2_norm,
                gradient=quantizer_gradient,
                init="uniform",
                entropy_temperature=entropy_temperature,
                restart_after=codebook_restart_after,
            ),
        )
        plain = TokenSpec(num_tokens, self.quantizer.codebook_size, codebook_embed_dim, grid=grid)
        self._spec = spec_of(self.quantizer, plain)
        self.post_quant = nn.Linear(codebook_embed_dim, z_channels)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return (*self.quantizer.loss_terms, "feature")

    @property
    def alignment_dim(self) -> int | None:
        return None if self.alignment is None else self.alignment.dim

    @property
    def raster_features(self) -> Mapping[str, int]:
        on_raster = {"latents": self.spec.dim} if self.layout == "2d" else {}
        return on_raster | {"decoded": self.decoder.conv_in.in_channels}

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def encode_map(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to the feature map (B, z_channels, h, w) of the convolutional encoder."""
        self.check_pixels(pixels)
        return self.encoder(pixels)

    def map_latents(self, spatial: Tensor) -> Tensor:
        """A feature map (B, z_channels, h, w) to latents (B, L, code dim), before quantization."""
        return self.pre_quant(self.token_encoder(spatial))

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to latents (B, L, code dim), before quantization."""
        return self.map_latents(self.encode_map(pixels))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.latents(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Ids (B, L), or multi-scale ids (see ``dequantize``), to pixels (B, C, H, W).

        Raises:
            ValueError: ids out of range, or not L of them.
        """
        self.check_condition(condition)
        codes = self.dequantize(tokens)
        return self.decoder(self.token_decoder.decode_map(self.post_quant(codes)))

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """The loss term "feature" is the mean squared error of the decoder's feature map to the detached encoder's.

        Before step ``direct_until`` of training there is a reconstruction "direct" beside the main one.

        Features: "latents", "quantized" (B, L, code dim); "spatial" and "decoded_spatial" (B, z_channels, h, w), the
        feature maps of encoder and decoder; "decoded" (B, h * w, z_channels), the latter in raster order; "alignment"
        (B, h * w, D) if there is a head.
        """
        self.check_condition(condition)
        spatial = self.encode_map(pixels)
        latents = self.map_latents(spatial)
        quantized = self.quantizer(latents, draws=draws)
        decoded = self.token_decoder(self.post_quant(quantized.quantized))
        features = {
            "latents": latents,
            "quantized": quantized.quantized,
            "spatial": spatial,
            "decoded_spatial": decoded.spatial,
            "decoded": rearrange(decoded.spatial, "b c h w -> b (h w) c"),
        }
        if decoded.aligned is not None:
            features["alignment"] = decoded.aligned
        losses = quantized.losses | {"feature": F.mse_loss(decoded.spatial, spatial.detach())}
        reconstructions = {MAIN: self.decoder(decoded.spatial)}
        if self.training and clock is not None and clock.step < self.direct_until:
            reconstructions["direct"] = self.decoder(spatial)
        return TokenizerOutput(reconstructions, quantized.ids, losses, features)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.model_arguments(config, state_dict)).with_official_weights(official.our_names(state_dict))
