"""Open-MAGVIT2's image tokenizer: a convolutional autoencoder whose codes are the signs of 18 channels.

Paper: Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual Generation (arXiv 2409.04410).
Official weights and conventions: github.com/TencentARC/SEED-Voken (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint
from vistok.checkpoints.weights import first_stage
from vistok.nn.conv import ConvDecoder, ConvEncoder
from vistok.quantizers import LFQ
from vistok.quantizers.named import chosen_quantizer
from vistok.tokenizers.convolutional import ConvTokenizer
from vistok.tokenizers.open_magvit2 import official
from vistok.types import TokenSpec


class OpenMAGVIT2(ConvTokenizer):
    """A raster of 2 ** bits ids without a codebook; any image whose sides are multiples of the stride encodes.

    The stride is 2 ** (levels - 1). There is no attention. Every level of the decoder begins with a group norm whose
    scale and shift are computed from the code map.

    Args:
        image_size: side of the images that ``spec`` describes, or (height, width).
        in_channels: 3, or 1 for grey images.
        channels: base width of encoder and decoder.
        channel_mult: width of each level, finest first, in units of ``channels``.
        res_blocks: residual blocks per level, and in the middle.
        bits: channels of a code, and bits of an id.
        entropy_temperature: temperature of the "entropy" loss term; None leaves the term out.
        position_weight, usage_weight: weights of the two entropies in that term, see ``EntropyLoss``.
        norm_groups: groups of all group norms (32 in every released model); they must divide every width.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``bits`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: sides that are not multiples of the stride, images of a single token, or widths that norm_groups
            does not divide.
    """

    registry_name = "open_magvit2"
    tiny = {
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "bits": 5,
        "norm_groups": 4,
    }
    sizes = {"f16": {"channel_mult": official.F16}, "f8": {"channel_mult": official.F8, "image_size": 128}}
    checkpoints = tuple(
        OfficialCheckpoint(f"TencentARC/Open-MAGVIT2-Tokenizer-{repo}", file, official.config(channel_mult, bits))
        for repo, file, channel_mult, bits in (
            ("256-resolution", "imagenet_256_L.ckpt", official.F16, 18),
            ("128-resolution", "imagenet_128_L.ckpt", official.F8, 18),
            ("16384-Pretrain", "pretrain256_16384.ckpt", official.F16, 14),
            ("262144-Pretrain", "pretrain256_262144.ckpt", official.F16, 18),
        )
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: tuple[int, ...] = official.F16,
        res_blocks: int = 4,
        bits: int = 18,
        entropy_temperature: float | None = 0.01,
        position_weight: float = 1.0,
        usage_weight: float = 1.0,
        norm_groups: int = 32,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__(image_size, in_channels, len(channel_mult))
        sizes = (channels, channel_mult, res_blocks)
        options: dict[str, Any] = {
            "norm_groups": norm_groups,
            "attend": False,
            "middle_blocks": res_blocks,
            "bias": False,
        }
        self.build(
            ConvEncoder(in_channels, bits, *sizes, **options, padding="around", out_kernel=1),
            nn.Identity(),
            chosen_quantizer(
                quantizer,
                bits,
                lambda: LFQ(
                    bits,
                    entropy_temperature=entropy_temperature,
                    position_weight=position_weight,
                    usage_weight=usage_weight,
                ),
            ),
            nn.Identity(),
            ConvDecoder(
                bits, in_channels, *sizes, **options, extra_blocks=0, upsample="depth_to_space", adaptive_norm=True
            ),
        )

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        spec = super()._spec_for_sides(sides)
        if spec.length == 1:
            raise ValueError(
                f"images of {sides[0]}x{sides[1]} have a single token, and the decoder reads the variance of the "
                f"tokens; take images with a side of at least {2 * self.stride}"
            )
        return spec

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        model = cls(**official.arguments(config))
        return model.with_official_weights(official.our_names(state_dict, len(model.decoder.levels)))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The moving averages where the file has them, as in the published scores, without the networks of losses."""
        return first_stage(state)
