"""FlexTok: ordered register tokens, any prefix of which decodes through a rectified-flow decoder.

Paper: FlexTok: Resampling Images into 1D Token Sequences of Flexible Length (Bachmann et al., arXiv 2502.13967, ICML
2025). Official weights and conventions: github.com/apple/ml-flextok. The reference packs a batch into one sequence with
a block mask; attention here is batched, with the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints import WEIGHTS, CheckpointError, OfficialCheckpoint, load_strictly
from vistok.draws import Draws, Keys
from vistok.flow import FlowState, TimeSampling, last
from vistok.guidance import APG, Scale
from vistok.nn.alignment import AlignmentConfig
from vistok.quantizers import FSQ
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.signatures import check
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.flextok import official
from vistok.tokenizers.flextok.networks import (
    PATH,
    Encoder,
    FlowDecoder,
    GuidanceName,
    TrunkConfig,
    denoise,
)
from vistok.tokenizers.kl_vae import KLVAE
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.devices import without_autocast
from vistok.utils.sides import image_sides, times

D12 = TrunkConfig(dim=768, num_layers=12)
TIMES = TimeSampling("mode", mode_scale=0.25)
LEVELS = (8, 8, 8, 5, 5, 5)
CORRUPTED_SHARE = 0.2  # of the samples of a batch, where token corruption is on
NestedDropout = Literal["uniform", "pow2", "uniform_pow2", "none"]
VAE_C16 = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "encoder_attention": ()}


class FlexTok(Tokenizer):
    """Images to ordered ids, coarse to fine; any prefix decodes.

    A frozen autoencoder maps pixels to latent maps; without one, the maps are the pixels themselves. The decoder
    samples: other ``draws`` give another image for the same ids, and images differ more the fewer ids there are.

    Args:
        image_size: side of the images, or (height, width); smaller images encode and decode too.
        in_channels: 3, or 1 for grey images.
        vae: arguments of the frozen ``KLVAE``, among them ``latent_scale``, which brings its latents to a standard
            deviation of about 1. None, without ``vae_weights``, works on pixels.
        vae_weights: folder or hub id of a diffusers AutoencoderKL, for training; ``vae`` overrides its config. Not
            needed to load a whole model, and not saved in the config: models are saved with all weights.
        patch_size: side of a patch of the maps, or (height, width).
        encoder, decoder: the two transformers.
        num_tokens: registers N.
        levels: of the quantizer, see ``FSQ``; their product is the codebook size.
        code_std: standard deviation of the initial weights of the layer before quantization. With 0, as released, all
            images have the same codes at first, and it takes long until they differ; 0.02 suits short runs. None is 0
            for FSQ and 0.02 for other quantizers, some of which compare directions, which zeros do not have.
        adaln_streams: 2 modulates the decoder's patches and registers separately, 1 together.
        nested_dropout: how many tokens a training sample keeps: "uniform" in 1..N; "pow2", one of 1, 2, 4, ..., N;
            "uniform_pow2", uniform, rounded up to one of these; "none", all.
        null_dropout: share of training samples that are decoded without any token, for guidance.
        quantizer_dropout: share of training samples whose codes are bounded but not rounded.
        token_corruption: largest share of tokens that is replaced by random ones, in a fifth of the training samples.
        time_sampling: distribution of training times.
        max_timestep, time_frequencies: of the decoder's time embedding, see ``FlowDecoder``.
        posterior: whether training encodes a "sample" of the autoencoder's posterior or its "mode".
        alignment: head for the "repa" loss, on the decoder's patches after block ``layer`` (counted from 0). Defaults:
            layer 1, 1,024 channels as in DINOv2-L, four times the decoder's width inside. None has no head.
        num_steps, guidance_scale, guidance: defaults of ``decode``.
        quantizer: config of a quantizer in place of FSQ with ``levels``, {name, …its arguments}, see
            ``build_quantizer``; its argument ``dim`` is the number of channels of a code. Multi-scale quantizers are
            refused: no prefixes of their ids decode.

    Raises:
        ValueError: sizes that do not divide, a multi-scale quantizer, or ``quantizer_dropout`` with a quantizer other
            than FSQ.
        CheckpointError: no autoencoder where ``vae_weights`` points.
    """

    registry_name = "flextok"
    tiny = {
        "image_size": 16,
        "patch_size": 4,
        "encoder": {"dim": 32, "num_layers": 1, "head_dim": 16},
        "decoder": {"dim": 32, "num_layers": 1, "head_dim": 16},
        "num_tokens": 8,
        "levels": (4, 4, 2),
        "time_frequencies": 16,
        "num_steps": 2,
    }
    reconstructs = False
    sizes = {
        "d12_d12": {
            "encoder": {"dim": 768, "num_layers": 12},
            "decoder": {"dim": 768, "num_layers": 12},
            "vae": VAE_C16,
        },
        "d18_d18": {
            "encoder": {"dim": 1152, "num_layers": 18},
            "decoder": {"dim": 1152, "num_layers": 18},
            "vae": VAE_C16,
        },
        "d18_d28": {
            "encoder": {"dim": 1152, "num_layers": 18},
            "decoder": {"dim": 1792, "num_layers": 28},
            "vae": VAE_C16,
        },
    }
    checkpoints = tuple(
        OfficialCheckpoint(f"EPFL-VILAB/flextok_{size}_{data}", WEIGHTS, official.released(*depths))
        for size, depths, data in (
            ("d12_d12", (12, 12), "in1k"),
            ("d18_d18", (18, 18), "in1k"),
            ("d18_d28", (18, 28), "in1k"),
            ("d18_d28", (18, 28), "dfn"),
        )
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        vae: dict[str, Any] | None = None,
        vae_weights: str | None = None,
        patch_size: int | tuple[int, int] = 2,
        encoder: TrunkConfig = D12,
        decoder: TrunkConfig = D12,
        num_tokens: int = 256,
        levels: tuple[int, ...] = LEVELS,
        code_std: float | None = None,
        adaln_streams: Literal[1, 2] = 2,
        nested_dropout: NestedDropout = "pow2",
        null_dropout: float = 0.2,
        quantizer_dropout: float = 0.0,
        token_corruption: float = 0.0,
        time_sampling: TimeSampling = TIMES,
        max_timestep: float = 1000.0,
        time_frequencies: int = 256,
        posterior: Literal["sample", "mode"] = "sample",
        alignment: AlignmentConfig | None = None,
        num_steps: int = 25,
        guidance_scale: float = 7.5,
        guidance: GuidanceName = "apg",
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        height, width = image_sides(image_size)
        self._input_shape = (in_channels, height, width)
        self.vae = None if vae is None and vae_weights is None else self._build_vae(vae or {}, vae_weights)
        channels = in_channels if self.vae is None else self.vae.spec.dim
        patch = image_sides(patch_size)
        stride = 1 if self.vae is None else self.vae.stride
        self._unit = (stride * patch[0], stride * patch[1])
        self._map_shape = (channels, height // stride, width // stride)
        self.quantizer = chosen_quantizer(quantizer, None, lambda: FSQ(levels))
        rounds = isinstance(self.quantizer, FSQ)
        if quantizer_dropout and not rounds:
            raise ValueError(
                f"quantizer_dropout {quantizer_dropout} leaves codes unrounded, and the quantizer "
                f"{(quantizer or {}).get('name')!r} rounds none; set it to 0, or take 'fsq'"
            )
        if code_std is None:
            code_std = 0.0 if rounds else 0.02
        plain = TokenSpec(num_tokens, self.quantizer.codebook_size, self.quantizer.dim, prefix_step=1)
        self._spec = spec_of(self.quantizer, plain)
        self.spec_for(self._input_shape)  # refuses sides that do not divide
        grid = (height // self._unit[0], width // self._unit[1])
        sizes = (channels, patch, grid, num_tokens, self.quantizer.dim)
        self.encoder = Encoder(as_dataclass(TrunkConfig, encoder), *sizes, code_std=code_std)
        self.decoder = FlowDecoder(
            as_dataclass(TrunkConfig, decoder),
            *sizes,
            streams=adaln_streams,
            max_timestep=max_timestep,
            frequency_dim=time_frequencies,
            alignment=alignment,
        )
        self.nested_dropout, self.null_dropout = nested_dropout, null_dropout
        self.quantizer_dropout, self.token_corruption = quantizer_dropout, token_corruption
        self.time_sampling = as_dataclass(TimeSampling, time_sampling)
        self.posterior = posterior
        self.num_steps, self.guidance_scale, self.guidance = num_steps, guidance_scale, guidance

    def _build_vae(self, vae: dict[str, Any], weights: str | None) -> KLVAE:
        channels, height, width = self._input_shape
        trained = None if weights is None else KLVAE.from_diffusers(weights, image_size=(height, width))
        if trained is not None:
            described = trained.config.items()
            vae = {key: value for key, value in described if key not in ("image_size", "in_channels")} | vae
            self._arguments |= {"vae": vae, "vae_weights": None}
        model = KLVAE(image_size=(height, width), in_channels=channels, **check(KLVAE, vae, "vae"))
        if trained is not None:
            load_strictly(model, trained.state_dict(), source=str(weights))
        self._vae_loaded = trained is not None
        self.register_load_state_dict_post_hook(_note_loaded)
        return model.requires_grad_(False)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return (*self.quantizer.loss_terms, "flow")

    @property
    def alignment_dim(self) -> int | None:
        head = self.decoder.alignment_head
        return None if head is None else head.out.out_features

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        most = self._input_shape[1:]
        if any(side % unit or not 0 < side <= limit for side, unit, limit in zip(sides, self._unit, most)):
            raise ValueError(
                f"image sides must be multiples of {times(self._unit)}, at most {times(most)}; got {times(sides)}; "
                "resize or crop the images"
            )
        return self._spec

    def to_maps(self, pixels: Tensor, *, draws: Draws | None = None) -> Tensor:
        """Pixels (B, C, H, W) to the maps (B, C', h, w) that are tokenized: the mode of the autoencoder's posterior,
        or a sample if ``draws`` has "posterior". Autocast does not apply to the autoencoder."""
        self.check_pixels(pixels)
        if self.vae is None:
            return pixels
        self._check_vae()
        with torch.no_grad(), without_autocast(pixels.device):
            latents = self.vae.encode(pixels, draws=draws if draws and "posterior" in draws else None)
        return rearrange(latents, "b (h w) c -> b c h w", h=pixels.shape[2] // self.vae.stride)

    def to_pixels(self, maps: Tensor) -> Tensor:
        """Maps (B, C', h, w) to pixels (B, C, H, W), not clamped."""
        if self.vae is None:
            return maps
        self._check_vae()
        with without_autocast(maps.device):
            latents = rearrange(maps, "b c h w -> b (h w) c").to(self.vae.dtype)
            return self.vae.decode(latents, grid=(maps.shape[2], maps.shape[3]))

    def _check_vae(self) -> None:
        if not self._vae_loaded:
            raise CheckpointError(
                "the autoencoder of this FlexTok has no weights: give a diffusers AutoencoderKL (folder or hub id) as "
                "model.vae_weights=…, or load a whole model (init_from=…, vistok.load)"
            )

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.encoder(self.to_maps(pixels, draws=draws)))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        condition: Condition | None = None,
        lengths: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: Scale | None = None,
        guidance: GuidanceName | APG | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """The first ids (B, k) of images to pixels, 1 <= k <= N.

        Args:
            lengths: (B,) how many of its k ids each image uses; None takes all.
            num_steps: Euler steps from noise to data; None takes the model's ``num_steps``.
            guidance_scale: a number, or a function of a step's time, which is 1 at noise and 0 at data. A scale of 1 is
                no guidance; None takes the model's ``guidance_scale``.
            guidance: "cfg" (plain), "apg" (adaptive projected), or an ``APG`` with other settings; None takes the
                model's ``guidance``.
            draws: from ``decoding_draws``; None takes those of seed 0. "noise" (B, C', h, w) sets the size of the
                images.

        Raises:
            ValueError: a wrong number of ids or steps, or ids out of range.
        """
        self.check_condition(condition)
        return self.to_pixels(last(self._trajectory(tokens, lengths, num_steps, guidance_scale, guidance, draws)).x)

    @torch.no_grad()
    def decode_stream(
        self,
        tokens: Tensor,
        *,
        condition: Condition | None = None,
        lengths: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: Scale | None = None,
        guidance: GuidanceName | APG | None = None,
        draws: Draws | None = None,
    ) -> Iterator[Tensor]:
        """As ``decode``, but yields the estimated image after every step; the last one is the result of ``decode``."""
        self.check_condition(condition)
        for state in self._trajectory(tokens, lengths, num_steps, guidance_scale, guidance, draws):
            yield self.to_pixels(PATH.data_estimate(state.x, state.velocity, state.t))

    def _trajectory(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        num_steps: int | None,
        guidance_scale: Scale | None,
        guidance: GuidanceName | APG | None,
        draws: Draws | None,
    ) -> Iterator[FlowState]:
        lengths = self._spec.prefix_lengths(tokens, lengths)
        draws = draws or self.decoding_draws(Keys.range(0, len(tokens)))
        ids = nn.functional.pad(tokens, (0, self._spec.length - tokens.shape[1]))
        return denoise(
            self.decoder,
            self.quantizer.ids_to_latents(ids),
            lengths,
            draws["noise"].to(tokens.device),
            num_steps=self.num_steps if num_steps is None else num_steps,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            guidance=self.guidance if guidance is None else guidance,
        )

    def decoding_draws(self, keys: Keys) -> Draws:
        return {"noise": keys.normal("decoding noise", *self._map_shape)}

    def training_draws(self, keys: Keys) -> Draws:
        draws = super().training_draws(keys) | {"noise": keys.normal("noise", *self._map_shape)}
        draws |= {name: keys.uniform(name) for name in ("time", "keep", "null")}
        if self.vae is not None and self.posterior == "sample":
            draws["posterior"] = keys.normal("posterior", self.vae.spec.length, self.vae.spec.dim)
        if self.quantizer_dropout:
            draws["unrounded"] = keys.uniform("unrounded")
        if self.token_corruption:
            draws["corrupt"] = keys.uniform("corrupt", 2)
            draws |= {name: keys.uniform(name, self._spec.length) for name in ("corrupt tokens", "corrupt ids")}
        return draws

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """Train at one random time per image. The loss term "flow" (B,) is the mean squared error of the velocity;
        those of the quantizer are over all tokens (FSQ has none).

        Raises:
            ValueError: no draws: a flow model cannot be trained without noise.
        """
        self.check_condition(condition)
        if draws is None:
            raise ValueError("FlexTok trains on random times and noise: pass draws=model.training_draws(keys)")
        maps = self.to_maps(pixels, draws=draws)
        clean = maps if target is None else self.to_maps(target, draws=draws)
        registers = self.encoder(maps)
        quantized = self.quantizer(registers, draws=draws)
        kept = kept_tokens(draws["keep"], self._spec.length, self.nested_dropout)
        null = draws["null"] < self.null_dropout
        given = self.decoder.embed_codes(self._perturb(quantized.quantized, registers, draws), kept, null)
        t = self.time_sampling(draws["time"])
        predicted = self.decoder(PATH.interpolate(clean, draws["noise"], t), t, given)
        flow = (predicted.velocity - PATH.velocity(clean, draws["noise"])).square().flatten(1).mean(1)
        features = {"latents": registers, "quantized": quantized.quantized, "time": t}
        head = self.decoder.alignment_head
        if predicted.features is not None and head is not None:
            features["alignment"] = head(predicted.features)
        return TokenizerOutput(None, quantized.ids, quantized.losses | {"flow": flow}, features)

    def _perturb(self, codes: Tensor, registers: Tensor, draws: Draws) -> Tensor:
        """Codes (B, N, d) with quantizer dropout and token corruption, where these are on."""
        if self.quantizer_dropout:
            unrounded = (draws["unrounded"] < self.quantizer_dropout)[:, None, None]
            codes = torch.where(unrounded, self.quantizer.continuous(registers), codes)
        if self.token_corruption:
            chosen, share = draws["corrupt"].unbind(1)
            share = torch.where(chosen < CORRUPTED_SHARE, share * self.token_corruption, 0)
            ids = (draws["corrupt ids"] * self._spec.num_ids).long()
            wrong = draws["corrupt tokens"] < share[:, None]
            codes = torch.where(wrong[..., None], self.quantizer.ids_to_latents(ids), codes)
        return codes

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build from the reference's nested config (see ``official``). It may have a key ``vae.block_out_channels``,
        for an autoencoder with other widths than the released one."""
        model = cls(**official.model_arguments(config))
        return model.with_official_weights(official.our_names(config, state_dict))

    embedded_config = staticmethod(official.embedded_config)


def kept_tokens(uniforms: Tensor, num_tokens: int, mode: NestedDropout) -> Tensor:
    """The number of tokens that nested dropout keeps, (B,) integers in 1..N, from uniform numbers (B,) in [0, 1)."""
    if mode == "none":
        return torch.full_like(uniforms, num_tokens, dtype=torch.int64)
    exponents = torch.arange((num_tokens - 1).bit_length() + 1, device=uniforms.device)
    powers = (2**exponents).clamp_max(num_tokens)
    if mode == "pow2":
        return powers[(uniforms * len(powers)).long()]
    count = 1 + (uniforms * num_tokens).long()
    return count if mode == "uniform" else powers[torch.searchsorted(powers, count)]


def _note_loaded(model: FlexTok, incompatible_keys: Any) -> None:
    model._vae_loaded = True
