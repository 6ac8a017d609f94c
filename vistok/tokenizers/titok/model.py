"""TiTok: an image as a sequence of 32 to 256 tokens without a raster.

Paper: An Image is Worth 32 Tokens for Reconstruction and Generation (arXiv 2406.07550). Official weights and
conventions: github.com/bytedance/1d-tokenizer (Apache-2.0).

Two-stage models predict the codes of a frozen MaskGIT-VQGAN in the first stage; the second stage trains a decoder from
such codes to pixels. The later single-stage models (arXiv 2501.07730) predict pixels directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

from torch import Tensor

from vistok.checkpoints import CheckpointError, OfficialCheckpoint
from vistok.checkpoints.official_config import OfficialConfig
from vistok.draws import Draws
from vistok.nn.initialisation import truncated_normal
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.gaussian import GaussianLatents, gaussian_kl
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.titok import official
from vistok.tokenizers.titok.networks import (
    BASE,
    LARGE,
    SMALL,
    CodecConfig,
    CodecRenderer,
    CodeHead,
    Decoder,
    Encoder,
    PixelHead,
    TransformerSize,
    learned,
)
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.devices import without_autocast
from vistok.utils.finite import finite_latents
from vistok.utils.sides import image_sides

T = TypeVar("T")
Bottleneck = Literal["vq", "vae"]
Output = Literal["pixels", "codes", "codec"]

TWO_STAGE = {"output": "codec", "token_dim": 12, "codebook_size": 4096, "codebook_l2_norm": True}
SINGLE_STAGE = {"output": "pixels", "token_dim": 64, "codebook_size": 8192, "codebook_l2_norm": False}
VAE = {"output": "pixels", "token_dim": 16, "bottleneck": "vae"}


def _size(
    encoder: TransformerSize, decoder: TransformerSize, num_tokens: int, kind: Mapping[str, Any]
) -> dict[str, Any]:
    return {"encoder": asdict(encoder), "decoder": asdict(decoder), "num_tokens": num_tokens, **kind}


class TiTok(Tokenizer):
    """Images to a sequence of ids, or of continuous latents, without a raster.

    The networks work on pixels in [0, 1]; public pixels are in [-1, 1].

    Args:
        image_size: side of the images, or (height, width).
        in_channels: 3, or 1 for grey images.
        encoder_patch_size, decoder_patch_size: sides of the patches; the image sides must be multiples of them.
        encoder, decoder: the two transformers.
        num_tokens: tokens N of an image.
        token_dim: channels of a token.
        bottleneck: "vq" gives ids, "vae" continuous latents.
        codebook_size: number of codes.
        codebook_l2_norm: compare and decode l2-normalised codes.
        codebook_clustering: in training, move rarely chosen codes to latents (arXiv 2307.15139).
        output: "pixels" predicts pixels. "codes" is the first of two stages: it predicts codes of a codec (feature
            "code_logits") and renders no pixels. "codec" is the second: the expected codes are decoded by the codec's
            decoder, which is part of the model.
        codec: codebook and decoder of the codec; used by "codes" and "codec".
        init_std: standard deviation of the initial weights. The reference's 0.02 suits its widths, which begin at 512.
            Narrow transformers then pass on so little of an image that all images have the same tokens for hundreds of
            steps: take about dim ** -0.5.
        latent_mean, latent_scale: standardisation of the latents of "vae", see ``GaussianLatents``.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``token_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: a size that patches do not divide, a decoder patch that is not the codec's stride, an unknown
            bottleneck or output, an ``init_std`` that is not positive, or a ``quantizer`` for a "vae".
    """

    registry_name = "titok"
    encoding_parts = ("latent_tokens", *Tokenizer.encoding_parts)
    tiny = {
        "image_size": 16,
        "encoder_patch_size": 4,
        "decoder_patch_size": 4,
        "encoder": {"dim": 32, "num_layers": 1, "num_heads": 2},
        "decoder": {"dim": 32, "num_layers": 1, "num_heads": 2},
        "num_tokens": 8,
        "token_dim": 4,
        "codebook_size": 32,
        "codec": {
            "codebook_size": 16,
            "codebook_embed_dim": 4,
            "channels": 8,
            "channel_mult": (1, 1, 2),
            "res_blocks": 1,
            "norm_groups": 4,
        },
    }
    native_range = (0.0, 1.0)
    truncated_normal: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "head")
    """The parts whose weights start from a truncated normal distribution; others keep torch's initialisation."""
    sizes = {
        "l32": _size(LARGE, LARGE, 32, TWO_STAGE),
        "b64": _size(BASE, BASE, 64, TWO_STAGE),
        "s128": _size(SMALL, SMALL, 128, TWO_STAGE),
        "bl64_vq8k": _size(BASE, LARGE, 64, SINGLE_STAGE),
        "bl128_vq8k": _size(BASE, LARGE, 128, SINGLE_STAGE),
        "sl256_vq8k": _size(SMALL, LARGE, 256, SINGLE_STAGE),
        "ll32_vae_c16": _size(LARGE, LARGE, 32, VAE),
        "bl64_vae_c16": _size(BASE, LARGE, 64, VAE),
        "bl128_vae_c16": _size(BASE, LARGE, 128, VAE),
    }
    checkpoints = tuple(
        OfficialCheckpoint(f"yucornetto/tokenizer_titok_{name}_imagenet", "model.safetensors", official.config(size))
        for name, size in sizes.items()
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        encoder: TransformerSize = BASE,
        decoder: TransformerSize = BASE,
        num_tokens: int = 64,
        token_dim: int = 12,
        bottleneck: Bottleneck = "vq",
        codebook_size: int = 4096,
        codebook_l2_norm: bool = True,
        codebook_clustering: bool = False,
        output: Output = "codec",
        codec: CodecConfig = CodecConfig(),  # noqa: B008 (immutable)
        init_std: float = 0.02,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_scale: float | tuple[float, ...] = 1.0,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        if quantizer is not None and bottleneck == "vae":
            raise ValueError("a bottleneck 'vae' has latents and no codes: leave quantizer out, or take 'vq'")
        encoder, decoder = as_dataclass(TransformerSize, encoder), as_dataclass(TransformerSize, decoder)
        codec = as_dataclass(CodecConfig, codec)
        _check_choice("bottleneck", bottleneck, ("vq", "vae"))
        _check_choice("output", output, ("pixels", "codes", "codec"))
        if init_std <= 0:
            raise ValueError(f"init_std must be positive, got {init_std}")
        size = image_sides(image_size)
        encoder_grid, self.decoder_grid = (_patches(size, patch) for patch in (encoder_patch_size, decoder_patch_size))
        if output != "pixels" and codec.stride != decoder_patch_size:
            raise ValueError(
                f"decoder_patch_size {decoder_patch_size} must be the codec's stride {codec.stride}: the decoder "
                "predicts a code for each of its patches"
            )
        self._input_shape, self.output = (in_channels, *size), output
        self.renders = self.reconstructs = output != "codes"
        self.has_posterior = bottleneck == "vae"
        out_dim = 2 * token_dim if bottleneck == "vae" else token_dim
        self.latent_tokens = learned(num_tokens, encoder.dim)
        self.encoder = Encoder(
            encoder,
            encoder_grid,
            encoder_patch_size,
            in_channels,
            num_tokens,
            out_dim,
            mixes_positions=output != "pixels",
        )
        self.decoder = Decoder(decoder, self.decoder_grid, num_tokens, token_dim)
        self.head = (
            PixelHead(decoder.dim, self.decoder_grid, decoder_patch_size, in_channels)
            if output == "pixels"
            else CodeHead(decoder.dim, codec.codebook_size)
        )
        for name in self.truncated_normal:
            getattr(self, name).apply(partial(truncated_normal, std=init_std))
        self.renderer = CodecRenderer(codec, self.decoder_grid, in_channels) if output == "codec" else None
        if bottleneck == "vae":
            self.gaussian = GaussianLatents(token_dim, latent_mean, latent_scale)
            self._spec = TokenSpec(num_tokens, None, token_dim)
        else:
            self.quantizer = chosen_quantizer(
                quantizer,
                token_dim,
                lambda: VectorQuantizer(
                    codebook_size,
                    token_dim,
                    normalize=codebook_l2_norm,
                    gradient="normalised",
                    init="uniform",
                    clustering=codebook_clustering,
                ),
            )
            plain = TokenSpec(num_tokens, self.quantizer.codebook_size, token_dim)
            self._spec = spec_of(self.quantizer, plain)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("kl",) if self.has_posterior else self.quantizer.loss_terms

    @property
    def predicted_codes(self) -> tuple[int, int] | None:
        if self.output == "pixels":
            return None
        return self.decoder.num_patches, cast(CodeHead, self.head).num_codes

    @property
    def last_layer(self) -> Tensor:
        if self.output == "codes":
            return super().last_layer
        decoder: Any = self.head if self.renderer is None else self.renderer.decoder
        return decoder.conv_out.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to the encoder's output: latents (B, N, D), or (B, N, 2D) means and
        log-variances of a "vae"."""
        self.check_pixels(pixels)
        return self.encoder(self.to_native(pixels), self.latent_tokens)

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Pixels to ids (B, N), or to standardised latents (B, N, D) of a "vae": the mode or, with ``draws``, a
        sample."""
        self.check_condition(condition)
        if not self.has_posterior:
            return self._in_full_precision(self.quantize, self.latents(pixels))
        return finite_latents(self.gaussian.standardise(self.gaussian.choose(*self.moments(pixels), draws)))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.gaussian.moments(self.latents(pixels)) if self.has_posterior else super().moments(pixels)

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Ids (B, N), or standardised latents (B, N, D), to pixels (B, C, H, W).

        Raises:
            ValueError: tokens of another tokenizer, another number of them, or a model that renders no pixels.
        """
        self.check_renders("decode")
        return self.render(self.decode_latents(self._from_tokens(tokens), condition))

    def _from_tokens(self, tokens: Tensor) -> Tensor:
        """The decoder's input (B, N, D)."""
        if not self.has_posterior:
            return self.dequantize(tokens)
        self.spec.check_latents(tokens)
        if tokens.shape[1] != self.spec.length:
            raise ValueError(f"this tokenizer decodes {self.spec.length} tokens at once, got {tokens.shape[1]}")
        return self.gaussian.restore(tokens)

    def decode_latents(self, latents: Tensor, condition: Condition | None = None) -> Tensor:
        """Codes or latents (B, N, D) to features of the decoder's patches, (B, P, W)."""
        self.check_condition(condition)
        return self.decoder(latents)

    def render(self, features: Tensor) -> Tensor:
        """Features (B, P, W) to pixels in [-1, 1]."""
        output = self.head(features)
        return self.from_native(output if self.renderer is None else self.renderer(output))

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """Loss terms: those of the quantizer, by default "codebook" and "commitment" (B, N); of a "vae" "kl" (B,), in
        nats per image. Features: "latents", before quantization, and "quantized", the decoder's input, (B, N, D) each,
        which are the same of a "vae"; unless the output is "pixels", also "code_logits" (B, P, K)."""
        tokens, latents, quantized, losses = self._bottleneck(self.latents(pixels), draws)
        decoded, features = self.decode_latents(quantized, condition), {"latents": latents, "quantized": quantized}
        if self.output == "pixels":
            return TokenizerOutput(self.render(decoded), tokens, losses, features)
        logits = self.head(decoded)
        reconstruction = None if self.renderer is None else self.from_native(self.renderer(logits))
        return TokenizerOutput(reconstruction, tokens, losses, features | {"code_logits": logits})

    def _bottleneck(self, hidden: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Tokens, latents, the decoder's input, and loss terms, from the encoder's output."""
        if self.has_posterior:
            mean, log_variance = self.gaussian.moments(hidden)
            latents = self.gaussian.choose(mean, log_variance, draws)
            kl = gaussian_kl(mean, log_variance).flatten(1).sum(1)
            return self.gaussian.standardise(latents), latents, latents, {"kl": kl}
        output = self._in_full_precision(partial(self.quantizer, draws=draws), hidden)
        return output.ids, hidden, output.quantized, output.losses

    @staticmethod
    def _in_full_precision(function: Callable[[Tensor], T], latents: Tensor) -> T:
        """Apply ``function`` in float32, even under autocast: codes are compared in it."""
        with without_autocast(latents.device):
            return function(latents.float())

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, official.WITHOUT_EFFECT)
        arguments = official.arguments(given)
        legacy = given.take("model.vq_model.is_legacy", True)
        finetuned = given.take("model.vq_model.finetune_decoder", True)
        if finetuned and not legacy:
            raise CheckpointError(
                "model.vq_model.finetune_decoder is True with is_legacy False: a single-stage model predicts pixels, "
                "not the codes that such a decoder reads; set one of them to the other value"
            )
        output: Output = "pixels" if not legacy else "codec" if finetuned else "codes"
        codec = CodecConfig() if output == "pixels" else official.codec(given)
        model = cls(**arguments, output=output, codec=codec)
        given.finish()
        state = official.with_clustering(state_dict, arguments)
        return model.with_official_weights(official.our_names(state, len(codec.channel_mult)))


def _patches(size: Sequence[int], patch: int) -> tuple[int, int]:
    if patch < 1 or size[0] % patch or size[1] % patch:
        raise ValueError(f"image_size {size[0]}x{size[1]} is not a multiple of the patch size {patch}")
    return size[0] // patch, size[1] // patch


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
