"""LlamaGen's image tokenizer: a convolutional VQGAN with a small, l2-normalised codebook.

Paper: Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (arXiv 2406.06525), section 3.1.
Official weights: github.com/FoundationVision/LlamaGen (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.nn.conv import ConvDecoder, ConvEncoder
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.vq import Gradient
from vistok.tokenizers.convolutional import ConvTokenizer

VQ16, VQ8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
ENTROPY_TEMPERATURE = 0.01


def _official(channel_mult: tuple[int, ...]) -> dict[str, Any]:
    return {
        "codebook_size": 16384,
        "codebook_embed_dim": 8,
        "encoder_ch_mult": channel_mult,
        "decoder_ch_mult": channel_mult,
        "z_channels": 256,
    }


class LlamaGenVQ(ConvTokenizer):
    """A raster of ids from a convolutional encoder; any image whose sides are multiples of the stride encodes.

    The stride is 2 ** (levels - 1): 16 for five levels (VQ-16), 8 for four (VQ-8).

    Args:
        image_size: side of the images that ``spec`` describes, or (height, width).
        in_channels: 3, or 1 for grey images.
        channels: base width of encoder and decoder.
        encoder_channel_mult, decoder_channel_mult: width of each level, finest first, in units of ``channels``.
        res_blocks: residual blocks per level of the encoder; the decoder has one more.
        z_channels: channels between the convolutional stacks and the code projections.
        codebook_size: number of codes.
        codebook_embed_dim: channels of a code.
        codebook_l2_norm: compare and decode l2-normalised codes.
        entropy_temperature: temperature of the "entropy" loss term (0.01 in LlamaGen); None leaves the term out.
        codebook_restart_after: training steps after which an unused code is moved onto a latent; 0 turns this off.
        quantizer_gradient: how the gradient passes the quantizer ("normalised" in LlamaGen); see ``VectorQuantizer``.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.
        dropout: inside the residual blocks, in training.
        norm_groups: groups of all group norms (32 in every released model); they must divide every width.

    Raises:
        ValueError: sides that are not multiples of the stride, encoder and decoder of unequal strides, or widths that
            norm_groups does not divide.
    """

    registry_name = "llamagen_vq"
    tiny = {
        "image_size": 16,
        "channels": 8,
        "encoder_channel_mult": (1, 1, 2),
        "decoder_channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "z_channels": 8,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "norm_groups": 4,
    }
    sizes = {
        "vq16": {"encoder_channel_mult": VQ16, "decoder_channel_mult": VQ16},
        "vq8": {"encoder_channel_mult": VQ8, "decoder_channel_mult": VQ8},
    }
    checkpoints = (
        OfficialCheckpoint("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", _official(VQ16)),
        OfficialCheckpoint("FoundationVision/LlamaGen", "vq_ds8_c2i.pt", _official(VQ8)),
        OfficialCheckpoint("peizesun/llamagen_t2i", "vq_ds16_t2i.pt", _official(VQ16)),
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        channels: int = 128,
        encoder_channel_mult: tuple[int, ...] = VQ16,
        decoder_channel_mult: tuple[int, ...] = VQ16,
        res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        entropy_temperature: float | None = None,
        codebook_restart_after: int = 0,
        dropout: float = 0.0,
        norm_groups: int = 32,
        quantizer_gradient: Gradient = "normalised",
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__(image_size, in_channels, len(encoder_channel_mult))
        if len(encoder_channel_mult) != len(decoder_channel_mult):
            raise ValueError(
                f"the encoder has {len(encoder_channel_mult)} levels and the decoder {len(decoder_channel_mult)}; "
                "images come back at their own size only if both have as many"
            )
        options: dict[str, Any] = {"norm_groups": norm_groups, "dropout": dropout}
        self.build(
            ConvEncoder(in_channels, z_channels, channels, encoder_channel_mult, res_blocks, **options),
            nn.Conv2d(z_channels, codebook_embed_dim, 1),
            chosen_quantizer(
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
            ),
            nn.Conv2d(codebook_embed_dim, z_channels, 1),
            ConvDecoder(z_channels, in_channels, channels, decoder_channel_mult, res_blocks, **options),
        )

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, WITHOUT_EFFECT)
        model = cls(
            channels=given.take("ch", 128),
            encoder_channel_mult=tuple(given.take("encoder_ch_mult", VQ16)),
            decoder_channel_mult=tuple(given.take("decoder_ch_mult", VQ16)),
            res_blocks=given.take("num_res_blocks", 2),
            z_channels=given.take("z_channels", 256),
            codebook_size=given.take("codebook_size", 16384),
            codebook_embed_dim=given.take("codebook_embed_dim", 8),
            codebook_l2_norm=given.take("codebook_l2_norm", True),
            entropy_temperature=ENTROPY_TEMPERATURE if given.take("entropy_loss_ratio", 0) > 0 else None,
            dropout=given.take("dropout_p", 0.0),
        )
        given.finish()
        state = {key: tensor for key, tensor in state_dict.items() if key != USAGE_COUNTER}
        return model.with_official_weights(rename(state, OFFICIAL_NAMES))


WITHOUT_EFFECT = {
    "note": "a remark",
    "codebook_show_usage": "counts which codes were used",
    "commit_loss_beta": "the weight of a loss, which the training config has",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

USAGE_COUNTER = "quantize.codebook_used"  # which codes the last training batches chose; no part of the model
OFFICIAL_NAMES = [
    (r"(\w+)\.conv_blocks\.(\d+)\.res\.(\d+)\.nin_shortcut\.(\w+)", r"\1.levels.\2.blocks.\3.shortcut.\4"),
    (r"(\w+)\.conv_blocks\.(\d+)\.res\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.blocks.\3.\4.\5"),
    (r"(\w+)\.conv_blocks\.(\d+)\.attn\.(\d+)\.proj_out\.(\w+)", r"\1.levels.\2.attentions.\3.out.\4"),
    (r"(\w+)\.conv_blocks\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.attentions.\3.\4.\5"),
    (r"(\w+)\.conv_blocks\.(\d+)\.(?:down|up)sample\.conv\.(\w+)", r"\1.levels.\2.resample.conv.\3"),
    (r"(\w+)\.mid\.1\.proj_out\.(\w+)", r"\1.middle.1.out.\2"),
    (r"(\w+)\.mid\.(\d)\.(\w+)\.(\w+)", r"\1.middle.\2.\3.\4"),
    (r"quant_conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
]
