"""IBQ's image tokenizer: VQGAN's autoencoder with index backpropagation, which gives every code a gradient.

Paper: Scalable Image Tokenization with Index Backpropagation Quantization (arXiv 2412.02692). Official weights and
conventions: github.com/TencentARC/SEED-Voken (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.checkpoints.weights import first_stage
from vistok.nn.conv import ConvDecoder, ConvEncoder
from vistok.quantizers import IndexQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.tokenizers.convolutional import ConvTokenizer

F16 = (1, 1, 2, 2, 4)


def _official(codebook_size: int) -> dict[str, Any]:
    sizes = {"ch": 128, "ch_mult": list(F16), "num_res_blocks": 4, "attn_resolutions": [16], "resolution": 256}
    return {
        "ddconfig": {"double_z": False, "z_channels": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0, **sizes},
        "n_embed": codebook_size,
        "embed_dim": 256,
    }


class IBQ(ConvTokenizer):
    """A raster of ids; any image whose sides are multiples of the stride 2 ** (levels - 1) encodes.

    Args:
        image_size: side of the images that ``spec`` describes, or (height, width).
        in_channels: 3, or 1 for grey images.
        channels: base width of encoder and decoder.
        channel_mult: width of each level, finest first, in units of ``channels``.
        attention_levels: levels (0 is the finest) with attention after each residual block; None is the deepest only.
            The middle always has attention.
        res_blocks: residual blocks per level of the encoder; the decoder has one more.
        z_channels: channels between the convolutional stacks and the code projections.
        codebook_size, codebook_embed_dim: number of codes, and their channels.
        entropy_temperature: temperature of the "entropy" loss term; None leaves the term out.
        position_weight, usage_weight: weights of the two entropies in that term, see ``EntropyLoss``.
        dropout: inside the residual blocks, in training.
        norm_groups: groups of all group norms (32 in every released model); they must divide every width.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: sides that are not multiples of the stride, attention in a level that does not exist, or widths that
            norm_groups does not divide.
    """

    registry_name = "ibq"
    tiny = {
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "z_channels": 8,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "norm_groups": 4,
    }
    sizes = {str(codes): {"codebook_size": codes} for codes in (1024, 8192, 16384, 262144)}
    checkpoints = (
        *(
            OfficialCheckpoint(f"TencentARC/IBQ-Tokenizer-{codes}", f"imagenet256_{codes}.ckpt", _official(codes))
            for codes in (1024, 8192, 16384, 262144)
        ),
        *(
            OfficialCheckpoint(
                f"TencentARC/IBQ-Tokenizer-{codes}-Pretrain", f"IBQ_pretrain_{codes}.ckpt", _official(codes)
            )
            for codes in (16384, 262144)
        ),
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: tuple[int, ...] = F16,
        attention_levels: tuple[int, ...] | None = None,
        res_blocks: int = 4,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 256,
        entropy_temperature: float | None = 0.01,
        position_weight: float = 1.0,
        usage_weight: float = 1.0,
        dropout: float = 0.0,
        norm_groups: int = 32,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__(image_size, in_channels, len(channel_mult))
        sizes = (channels, channel_mult, res_blocks)
        options: dict[str, Any] = {"norm_groups": norm_groups, "dropout": dropout, "attention_levels": attention_levels}
        self.build(
            ConvEncoder(in_channels, z_channels, *sizes, **options),
            nn.Conv2d(z_channels, codebook_embed_dim, 1),
            chosen_quantizer(
                quantizer,
                codebook_embed_dim,
                lambda: IndexQuantizer(
                    codebook_size,
                    codebook_embed_dim,
                    entropy_temperature=entropy_temperature,
                    position_weight=position_weight,
                    usage_weight=usage_weight,
                ),
            ),
            nn.Conv2d(codebook_embed_dim, z_channels, 1),
            ConvDecoder(z_channels, in_channels, *sizes, **options),
        )

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        model = cls(**_arguments(config))
        names = our_names(state_dict, len(model.decoder.levels))
        return model.with_official_weights(names)

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The moving averages of a training file, with which the published scores were measured."""
        return first_stage(state)


WITHOUT_EFFECT = {
    "beta": "the weight of a loss, which the training config has",
    "l2_normalize": "the reference does not read it",
    "cosine_similarity": "the reference does not read it",
    "entropy_temperature": "of the entropy loss, which is off",
    "sample_minimization_weight": "of the entropy loss, which is off",
    "batch_maximization_weight": "of the entropy loss, which is off",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    given = OfficialConfig(config, WITHOUT_EFFECT)
    channels, resolution = given.take("ddconfig.in_channels", 3), given.take("ddconfig.resolution")
    given.require("ddconfig.out_ch", channels, why="images come back with their own channels")
    given.require("ddconfig.double_z", False, why="codes have no variance")
    channel_mult, attending = tuple(given.take("ddconfig.ch_mult")), given.take("ddconfig.attn_resolutions")
    found = {
        "image_size": resolution,
        "in_channels": channels,
        "channels": given.take("ddconfig.ch"),
        "channel_mult": channel_mult,
        "attention_levels": tuple(i for i in range(len(channel_mult)) if resolution // 2**i in attending),
        "res_blocks": given.take("ddconfig.num_res_blocks"),
        "z_channels": given.take("ddconfig.z_channels"),
        "codebook_size": given.take("n_embed"),
        "codebook_embed_dim": given.take("embed_dim"),
        "dropout": given.take("ddconfig.dropout", 0.0),
    }
    if given.take("use_entropy_loss", True):
        found |= {
            "entropy_temperature": given.take("entropy_temperature", 0.01),
            "position_weight": given.take("sample_minimization_weight", 1.0),
            "usage_weight": given.take("batch_maximization_weight", 1.0),
        }
    else:
        found["entropy_temperature"] = None
    given.finish()
    return found


def our_names(state: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """The reference's keys under our names. It counts the decoder's levels from the finest, we from the deepest."""
    levels = [
        (r"encoder\.down\.(\d+)\.(.+)", r"encoder.levels.\1.\2"),
        *((rf"decoder\.up\.{i}\.(.+)", rf"decoder.levels.{num_levels - 1 - i}.\1") for i in range(num_levels)),
    ]
    return rename(rename(state, levels), OFFICIAL_NAMES)


OFFICIAL_NAMES = [
    (r"(\w+)\.levels\.(\d+)\.block\.(\d+)\.nin_shortcut\.(\w+)", r"\1.levels.\2.blocks.\3.shortcut.\4"),
    (r"(\w+)\.levels\.(\d+)\.block\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.blocks.\3.\4.\5"),
    (r"(\w+)\.levels\.(\d+)\.attn\.(\d+)\.proj_out\.(\w+)", r"\1.levels.\2.attentions.\3.out.\4"),
    (r"(\w+)\.levels\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.attentions.\3.\4.\5"),
    (r"(\w+)\.levels\.(\d+)\.(?:down|up)sample\.conv\.(\w+)", r"\1.levels.\2.resample.conv.\3"),
    (r"(\w+)\.mid\.block_1\.(\w+)\.(\w+)", r"\1.middle.0.\2.\3"),
    (r"(\w+)\.mid\.attn_1\.proj_out\.(\w+)", r"\1.middle.1.out.\2"),
    (r"(\w+)\.mid\.attn_1\.(\w+)\.(\w+)", r"\1.middle.1.\2.\3"),
    (r"(\w+)\.mid\.block_2\.(\w+)\.(\w+)", r"\1.middle.2.\2.\3"),
    (r"quant_conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
]
