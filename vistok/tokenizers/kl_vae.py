"""The KL-regularised convolutional autoencoder of latent diffusion, with a Gaussian posterior per position.

Paper: High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), section 3.1. The network is
diffusers' AutoencoderKL. Weights load from any AutoencoderKL that diffusers saved, and from the released KL-16 of MAR
(arXiv 2406.11838; github.com/LTH14/mar, MIT; also used by xAR), which has the names of latent diffusion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from einops import rearrange
from torch import Tensor

from vistok.checkpoints import CheckpointError, OfficialCheckpoint, read_weights, rename, snapshot
from vistok.checkpoints.official_config import OfficialConfig
from vistok.checkpoints.weights import without_losses
from vistok.draws import Draws
from vistok.nn.conv import check_groups
from vistok.quantizers.gaussian import GaussianLatents, gaussian_kl
from vistok.tokenizers.base import Tokenizer
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec
from vistok.utils.finite import finite_latents
from vistok.utils.sides import check_grid, grid_of, image_sides

KL16_SCALE = 0.2325
"""The factor of MAR and xAR on the latents of KL-16, which brings their standard deviation to about 1."""
DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def _narrow_latents(latent_channels: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": latent_channels,
        "layers_per_block": 2,
        "scaling_factor": None,
    }


class KLVAE(Tokenizer):
    """A raster of continuous latents; any image whose sides are multiples of the stride encodes.

    The stride is 2 ** (levels - 1). ``encode`` returns the posterior's mode, or a sample if draws are given. Public
    latents are standardised: ``(latent - latent_mean) * latent_scale``.

    Args:
        image_size: side of the images that ``spec`` describes, or (height, width).
        in_channels: 3, or 1 for grey images.
        block_out_channels: width of each level, finest first.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels D of a latent.
        encoder_attention, decoder_attention: levels (0 is the finest) with attention after each residual block.
        middle_attention: whether the middle blocks of encoder and decoder have attention.
        use_quant_conv, use_post_quant_conv: whether there is a 1x1 convolution before and after the posterior.
        norm_groups: groups of all group norms; they must divide every width.
        act_fn: activation, by diffusers' name.
        latent_mean, latent_scale: one number, or one per latent channel; ``standardise`` measures them.

    Raises:
        ValueError: sides that are not multiples of the stride, widths that norm_groups does not divide, attention in a
            level that does not exist, or statistics for another number of channels.
    """

    registry_name = "kl_vae"
    encoding_parts = ("vae.encoder.*", "vae.quant_conv.*")
    tiny = {
        "image_size": 16,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "encoder_attention": (2,),
        "norm_groups": 4,
    }
    has_posterior = True
    sizes = {
        "kl16": {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 16, "latent_scale": KL16_SCALE},
    }
    checkpoints = (
        OfficialCheckpoint("", "kl16.ckpt", {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}),
        OfficialCheckpoint(
            "EPFL-VILAB/flextok_vae_c4", DIFFUSERS_WEIGHTS, _narrow_latents(4), licence="Apple, research only"
        ),
        OfficialCheckpoint(
            "EPFL-VILAB/flextok_vae_c8", DIFFUSERS_WEIGHTS, _narrow_latents(8), licence="Apple, research only"
        ),
        OfficialCheckpoint(
            "EPFL-VILAB/flextok_vae_c16", DIFFUSERS_WEIGHTS, _narrow_latents(16), licence="Apple, research only"
        ),
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        encoder_attention: tuple[int, ...] = (4,),
        decoder_attention: tuple[int, ...] = (),
        middle_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        norm_groups: int = 32,
        act_fn: str = "silu",
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_scale: float | tuple[float, ...] = 1.0,
    ):
        super().__init__()
        from diffusers import AutoencoderKL

        levels = len(block_out_channels)
        self.stride = 2 ** (levels - 1)
        height, width = image_sides(image_size)
        self._input_shape = (in_channels, height, width)
        self._latent_channels = latent_channels
        self._spec = self.spec_for(self._input_shape)
        for width in block_out_channels:
            check_groups(width, norm_groups)
        up_types = _block_types("UpDecoderBlock2D", "AttnUpDecoderBlock2D", decoder_attention, levels)
        self.vae: Any = AutoencoderKL(  # diffusers does not declare the types of its layers
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=_block_types("DownEncoderBlock2D", "AttnDownEncoderBlock2D", encoder_attention, levels),
            up_block_types=up_types[::-1],  # diffusers counts the decoder's levels from the coarsest
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=middle_attention,
        )
        self.gaussian = GaussianLatents(latent_channels, latent_mean, latent_scale)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("kl",)

    @property
    def last_layer(self) -> Tensor:
        return self.vae.decoder.conv_out.weight

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        grid = grid_of(sides, self.stride)
        return TokenSpec(grid[0] * grid[1], None, self._latent_channels, grid=grid)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_pixels(pixels)
        hidden = self.vae.encoder(pixels)
        if self.vae.quant_conv is not None:
            hidden = self.vae.quant_conv(hidden)
        return self.gaussian.moments(rearrange(hidden, "b d h w -> b (h w) d"))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Pixels to standardised latents (B, L, D): the posterior's mode, or, with ``draws``, a sample."""
        self.check_condition(condition)
        return finite_latents(self.gaussian.standardise(self.gaussian.choose(*self.moments(pixels), draws)))

    def decode(
        self, tokens: Tensor, *, condition: Condition | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Standardised latents (B, h * w, D) to pixels (B, C, h * stride, w * stride).

        Args:
            grid: (h, w) of the latents; None for the grid of ``spec``.

        Raises:
            ValueError: latents of another VAE, or not h * w of them.
        """
        self.check_condition(condition)
        places = grid or self.spec.raster
        self.spec.check_latents(tokens)
        check_grid(tokens, places)
        return self.decode_latents(self.gaussian.restore(tokens), places)

    def decode_latents(self, latents: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Raw latents (B, h * w, D), before standardisation, to pixels."""
        latents = rearrange(latents, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        return self.vae.decoder(latents)

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """Loss term "kl": KL of the posterior to the unit normal in nats per image, (B,)."""
        self.check_condition(condition)
        mean, log_variance = self.moments(pixels)
        latents = self.gaussian.choose(mean, log_variance, draws)
        reconstruction = self.decode_latents(latents, self.spec_for(pixels.shape[1:]).raster)
        losses = {"kl": gaussian_kl(mean, log_variance).flatten(1).sum(1)}
        return TokenizerOutput(reconstruction, self.gaussian.standardise(latents), losses, {"latents": latents})

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build from MAR's arguments (ch_mult, embed_dim) with latent-diffusion names, or from diffusers' config and
        names."""
        if "block_out_channels" in config:
            return cls._from_diffusers(config, state_dict)
        given = OfficialConfig(config, WITHOUT_EFFECT)
        ch_mult, width, latent_channels = tuple(given.take("ch_mult")), given.take("ch", 128), given.take("embed_dim")
        channels = given.take("in_channels", 3)
        given.require("out_ch", channels, why="images come back with the channels that they have")
        given.require("z_channels", latent_channels, why="no released model has another width in front of its moments")
        given.require("dropout", 0.0, why="no released model has it")
        given.require("double_z", True, why="the posterior has a mean and a variance")
        given.require("use_linear_attn", False, why="no released model has it")
        given.require("attn_type", "vanilla", why="no released model has another")
        given.require("resamp_with_conv", True, why="no released model does without")
        model = cls(
            in_channels=channels,
            block_out_channels=tuple(width * mult for mult in ch_mult),
            layers_per_block=given.take("num_res_blocks", 2),
            latent_channels=latent_channels,
            # The reference derives the levels with attention from resolutions; the weights show them directly.
            encoder_attention=_levels_with_attention("encoder.down", state_dict),
            decoder_attention=_levels_with_attention("decoder.up", state_dict),
            latent_scale=given.take("scale_factor", KL16_SCALE),
        )
        given.finish()
        state = rename(state_dict, latent_diffusion_names(len(ch_mult)))
        return model.with_official_weights({key: _as_linear(key, tensor) for key, tensor in state.items()})

    @classmethod
    def _from_diffusers(
        cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], image_size: int | tuple[int, int] = 256
    ) -> Self:
        given = OfficialConfig(config, DIFFUSERS_WITHOUT_EFFECT)
        given.require("_class_name", "AutoencoderKL", why="other classes are other models")
        channels, widths = given.take("in_channels", 3), tuple(given.take("block_out_channels"))
        given.require("out_channels", channels, why="images come back with the channels that they have")
        mean, scale = _diffusers_statistics(given)
        model = cls(
            image_size=image_size,
            in_channels=channels,
            block_out_channels=widths,
            layers_per_block=given.take("layers_per_block", 1),
            latent_channels=given.take("latent_channels", 4),
            encoder_attention=_attending(given, "down_block_types", "DownEncoderBlock2D", len(widths)),
            decoder_attention=_attending(given, "up_block_types", "UpDecoderBlock2D", len(widths), finest_first=False),
            middle_attention=given.take("mid_block_add_attention", True),
            use_quant_conv=given.take("use_quant_conv", True),
            use_post_quant_conv=given.take("use_post_quant_conv", True),
            norm_groups=given.take("norm_num_groups", 32),
            act_fn=given.take("act_fn", "silu"),
            latent_mean=mean,
            latent_scale=scale,
        )
        given.finish()
        state = rename(rename(state_dict, OLD_DIFFUSERS_NAMES), DIFFUSERS_NAMES)
        return model.with_official_weights({key: _as_linear(key, tensor) for key, tensor in state.items()})

    @classmethod
    def from_diffusers(cls, source: str | Path, *, image_size: int | tuple[int, int] = 256, **hub_options: Any) -> Self:
        """Load an AutoencoderKL that diffusers saved: a folder, or a hub id.

        Raises:
            CheckpointError: nothing there, another class of model, or weights that do not fit.
        """
        folder = Path(source)
        if not folder.exists():
            folder = snapshot(str(source), [DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS], **hub_options)
        config = _read_diffusers_config(folder)
        if config.get("_class_name") != "AutoencoderKL":
            raise CheckpointError(f"{folder} holds a {config.get('_class_name')}, not a diffusers AutoencoderKL")
        return cls._from_diffusers(config, read_weights(folder / DIFFUSERS_WEIGHTS), image_size).eval()

    @staticmethod
    def embedded_config(file: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """The config that diffusers wrote beside a weights file, if it did."""
        beside = file.name == DIFFUSERS_WEIGHTS and (file.parent / DIFFUSERS_CONFIG).is_file()
        return _read_diffusers_config(file.parent) if beside else None

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return without_losses(state)


WITHOUT_EFFECT = {
    "resolution": "says, with attn_resolutions, which levels attend; the weights say so more directly",
    "attn_resolutions": "says, with resolution, which levels attend; the weights say so more directly",
    "lossconfig": "losses of the training, and its discriminator",
    "lossconfig.*": "losses of the training, and its discriminator",
}
"""Arguments of latent diffusion and MAR that do not change what the model computes, each with the reason."""

DIFFUSERS_WITHOUT_EFFECT = {
    "_diffusers_version": "who wrote the file",
    "_name_or_path": "where the file lay",
    "sample_size": "the side of the training images; any multiple of the stride encodes",
    "force_upcast": "the precision that diffusers' pipelines switch to; ours stays as it is loaded",
}
"""Keys of a diffusers config that do not change what the model computes, each with the reason."""


def latent_diffusion_names(levels: int) -> list[tuple[str, str]]:
    """Rules from latent diffusion's names to ours. Its decoder counts levels from the finest, diffusers' from the
    coarsest."""
    rules = []
    for level in range(levels):
        for part, block, resample in (
            (f"encoder.down.{level}", f"vae.encoder.down_blocks.{level}", "downsample"),
            (f"decoder.up.{level}", f"vae.decoder.up_blocks.{levels - 1 - level}", "upsample"),
        ):
            part = re.escape(part)
            rules += [
                (rf"{part}\.block\.(\d+)\.nin_shortcut\.(\w+)", rf"{block}.resnets.\1.conv_shortcut.\2"),
                (rf"{part}\.block\.(\d+)\.(\w+)\.(\w+)", rf"{block}.resnets.\1.\2.\3"),
                (rf"{part}\.{resample}\.conv\.(\w+)", rf"{block}.{resample}rs.0.conv.\1"),
                *_attention_names(rf"{part}\.attn\.(\d+)", rf"{block}.attentions.\1"),
            ]
    for part in ("encoder", "decoder"):
        middle = f"vae.{part}.mid_block"
        rules += [
            (rf"{part}\.mid\.block_1\.(\w+)\.(\w+)", rf"{middle}.resnets.0.\1.\2"),
            (rf"{part}\.mid\.block_2\.(\w+)\.(\w+)", rf"{middle}.resnets.1.\1.\2"),
            *_attention_names(rf"{part}\.mid\.attn_(1)", rf"{middle}.attentions.0"),
            (rf"{part}\.norm_out\.(\w+)", rf"vae.{part}.conv_norm_out.\1"),
            (rf"({part}\.conv_(?:in|out)\.\w+)", r"vae.\1"),
        ]
    return [*rules, (r"((?:post_)?quant_conv\.\w+)", r"vae.\1")]


def _attention_names(old: str, new: str) -> list[tuple[str, str]]:
    return [
        (rf"{old}\.norm\.(\w+)", rf"{new}.group_norm.\2"),
        (rf"{old}\.proj_out\.(\w+)", rf"{new}.to_out.0.\2"),
        (rf"{old}\.([qkv])\.(\w+)", rf"{new}.to_\2.\3"),
    ]


OLD_DIFFUSERS_NAMES = [
    (rf"(.*\.attentions\.\d+)\.{old}\.(\w+)", rf"\1.{new}.\2")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
]
"""Diffusers before 0.15 named the attention projections differently."""

DIFFUSERS_NAMES = [
    (r"((?:encoder|decoder)\.(?:conv_in|conv_out|conv_norm_out|mid_block|down_blocks|up_blocks)\..*)", r"vae.\1"),
    (r"((?:post_)?quant_conv\.\w+)", r"vae.\1"),
]


def _as_linear(key: str, tensor: Tensor) -> Tensor:
    """Latent diffusion stores attention projections as 1x1 convolutions."""
    pointwise = ".attentions." in key and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
    return tensor[:, :, 0, 0] if pointwise else tensor


def _levels_with_attention(part: str, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    found = (re.match(rf"{re.escape(part)}\.(\d+)\.attn\.", key) for key in state)
    return tuple(sorted({int(match.group(1)) for match in found if match}))


def _block_types(plain: str, attending: str, attention: tuple[int, ...], levels: int) -> tuple[str, ...]:
    """Diffusers' names of the levels' blocks, finest first."""
    if any(not 0 <= level < levels for level in attention):
        raise ValueError(f"attention at levels {tuple(attention)}, but there are levels 0..{levels - 1} (0 is finest)")
    return tuple(attending if level in attention else plain for level in range(levels))


def _read_diffusers_config(folder: Path) -> dict[str, Any]:
    path = folder / DIFFUSERS_CONFIG
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; expected a folder saved by diffusers") from error


def _diffusers_statistics(given: OfficialConfig) -> tuple[Any, Any]:
    """(mean, scale) of the standardisation ``(latent - mean) * scale`` in a diffusers config.

    Raises:
        CheckpointError: only one of latents_mean and latents_std, or a shift_factor beside them.
    """
    scaling, shift = given.take("scaling_factor", None), given.take("shift_factor", None)
    means, deviations = given.take("latents_mean", None), given.take("latents_std", None)
    scaling = 1.0 if scaling is None else scaling
    if (means is None) != (deviations is None) or (means is not None and shift):
        raise CheckpointError(
            "the config's latents_mean and latents_std go together, without a shift_factor; got "
            f"latents_mean {means!r}, latents_std {deviations!r}, shift_factor {shift!r}"
        )
    if means is None:
        return shift or 0.0, scaling
    return tuple(means), tuple(scaling / deviation for deviation in deviations)


def _attending(
    given: OfficialConfig, key: str, plain: str, levels: int, *, finest_first: bool = True
) -> tuple[int, ...]:
    """The levels (0 is the finest) whose diffusers block has attention.

    Raises:
        CheckpointError: an unknown block, or another number of blocks than levels.
    """
    names = given.take(key, [plain] * levels)
    if len(names) != levels or set(names) - {plain, f"Attn{plain}"}:
        raise CheckpointError(f"{key} must be {levels} of {plain} and Attn{plain}, got {names}")
    return tuple(level for level, name in enumerate(names if finest_first else reversed(names)) if name != plain)
