"""Open-MAGVIT2's video tokenizer: the image tokenizer with causal convolutions in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint
from vistok.checkpoints.weights import first_stage
from vistok.nn.causal_conv import CausalConv3d, CausalDepthToSpace, CausalDownsample
from vistok.nn.conv import ConvDecoder, ConvEncoder
from vistok.quantizers import LFQ
from vistok.quantizers.named import chosen_quantizer
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.convolutional import ConvTokenizer
from vistok.tokenizers.open_magvit2 import official
from vistok.types import TokenSpec


class OpenMAGVIT2Video(ConvTokenizer):
    """A box (t, h, w) of 2 ** bits ids without a codebook, of clips (B, C, T, H, W).

    Every level but the deepest halves the sides; if its ``channel_mult`` is not 1, it halves time too. If n levels
    halve time, a clip has 1 + k 2 ** n frames and 1 + k tokens in time. Convolutions are causal; group norms read the
    whole clip. Arguments that are not listed here are those of ``OpenMAGVIT2``.

    Args:
        num_frames: frames of the clips that ``spec`` describes.
        quantizer: as in ``OpenMAGVIT2``, but not a multi-scale one, which needs images.

    Raises:
        ValueError: sides that are not multiples of the stride, another number of frames, or widths that norm_groups
            does not divide.
    """

    registry_name = "open_magvit2_video"
    data_arguments: ClassVar[Mapping[str, str]] = {**Tokenizer.data_arguments, "num_frames": "num_frames"}
    tiny = {
        "num_frames": 5,
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 2, 2),
        "res_blocks": 1,
        "bits": 5,
        "norm_groups": 4,
    }
    sizes = {"f4x8": {}}
    checkpoints = (
        OfficialCheckpoint(
            "TencentARC/Open-MAGVIT2-Tokenizer-262144-Video", "video_128_262144.ckpt", official.config(official.F8, 18)
        ),
    )

    def __init__(
        self,
        num_frames: int = 17,
        image_size: int | tuple[int, int] = 128,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: tuple[int, ...] = official.F8,
        res_blocks: int = 4,
        bits: int = 18,
        entropy_temperature: float | None = 0.01,
        position_weight: float = 1.0,
        usage_weight: float = 1.0,
        norm_groups: int = 32,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__(image_size, in_channels, len(channel_mult))
        self._input_shape = (in_channels, num_frames, *self._input_shape[1:])
        in_time = [mult != 1 for mult in channel_mult[:-1]]
        self.time_stride = 2 ** sum(in_time)
        sizes = (channels, channel_mult, res_blocks)
        options: dict[str, Any] = {
            "norm_groups": norm_groups,
            "attend": False,
            "middle_blocks": res_blocks,
            "bias": False,
        }
        options["conv"] = CausalConv3d
        self.build(
            ConvEncoder(
                in_channels,
                bits,
                *sizes,
                **options,
                out_kernel=1,
                resample=lambda level, width: CausalDownsample(width, in_time=in_time[level]),
            ),
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
                bits,
                in_channels,
                *sizes,
                **options,
                extra_blocks=0,
                adaptive_norm=True,
                resample=lambda level, width: CausalDepthToSpace(width, in_time=in_time[level - 1]),
            ),
        )

    @property
    def raster_features(self) -> Mapping[str, int]:
        """No features: tokens lie in a box (t, h, w), not on the raster of one image."""
        return {}

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        frames, height, width = sides
        if frames < 1 or (frames - 1) % self.time_stride:
            raise ValueError(
                f"clips must have one frame and a multiple of {self.time_stride} more, got {frames}; take "
                f"{1 + self.time_stride * max((frames - 1) // self.time_stride, 1)} frames"
            )
        flat = super()._spec_for_sides((height, width))
        if flat.scales:
            raise ValueError("quantizers of growing grids are of images, not of clips: take one of a single grid")
        steps = 1 + (frames - 1) // self.time_stride
        if steps * flat.length == 1:
            raise ValueError(
                f"clips of {frames}x{height}x{width} have a single token, and the decoder reads the variance of the "
                "tokens; take larger ones"
            )
        return TokenSpec(steps * flat.length, flat.codebook_size, flat.dim, grid=(steps, *flat.raster))

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        model = cls(**official.arguments(config))
        names = official.our_names(official.without_wrappers(state_dict), len(model.decoder.levels))
        return model.with_official_weights(names)

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The moving averages where the file has them, as in the published scores, without the networks of losses."""
        return first_stage(state)
