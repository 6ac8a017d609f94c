"""MingTok: a continuous tokenizer for both understanding and generation of images.

Paper: Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer (arXiv 2510.06590,
section 2). Official weights and conventions: github.com/inclusionAI/Ming-UniVision (MIT).

Three transformers in a row: a low-level encoder computes compact latents, which are the tokens; a causal semantic
decoder expands them to wide features, which a language model reads; a pixel decoder turns these features into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor

from vistok.checkpoints import OfficialCheckpoint
from vistok.checkpoints.official_config import OfficialConfig
from vistok.draws import Draws, Keys
from vistok.quantizers.gaussian import LatentScale
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.mingtok import official
from vistok.tokenizers.mingtok.expansion import SemanticExpander
from vistok.tokenizers.mingtok.networks import LowLevelEncoder, PixelDecoder, SemanticDecoder, StageConfig
from vistok.types import MAIN, Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.finite import finite_latents
from vistok.utils.sides import image_sides, times

ENCODER = StageConfig(768, 12, 12, "swiglu")
SEMANTIC = StageConfig(1024, 24, 16, "swiglu")
PIXEL = StageConfig(1024, 24, 16)


class MingTok(Tokenizer):
    """A raster of continuous latents; any image whose sides are multiples of ``patch_size`` encodes.

    The position table is resized for other sizes than ``image_size``.

    Args:
        image_size: side of the images, or (height, width), that the position table is made for.
        in_channels: 3, or 1 for grey images.
        patch_size: side of the patch of a token.
        pixel_patch_size: side of the patches of the pixel decoder; divides ``patch_size``.
        encoder, semantic_decoder, pixel_decoder: the three transformers.
        latent_dim: channels d of a token.
        latent_mean, latent_scale: standardisation of the latents, see ``LatentScale``.
        mask_ratio: share of the patches that a second training pass masks (masked image modelling, section 2.2), in
            [0, 1); 0 leaves that pass out.

    Raises:
        ValueError: sizes that do not divide each other, or a mask ratio out of range.
    """

    registry_name = "mingtok"
    tiny = {
        "image_size": 16,
        "patch_size": 4,
        "pixel_patch_size": 2,
        "encoder": {"dim": 16, "num_layers": 1, "num_heads": 2, "feed_forward": "swiglu"},
        "semantic_decoder": {"dim": 24, "num_layers": 2, "num_heads": 2, "feed_forward": "swiglu"},
        "pixel_decoder": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "latent_dim": 4,
    }
    sizes = {
        "0.7b": {
            "encoder": asdict(ENCODER),
            "semantic_decoder": asdict(SEMANTIC),
            "pixel_decoder": asdict(PIXEL),
            "latent_mean": 1.46817409,
            "latent_scale": 1 / 8.09449291,
        }
    }
    checkpoints = (OfficialCheckpoint("inclusionAI/MingTok-Vision", "model.safetensors", official.RELEASED),)

    def __init__(
        self,
        image_size: int | tuple[int, int] = 512,
        in_channels: int = 3,
        patch_size: int = 32,
        pixel_patch_size: int = 16,
        encoder: StageConfig = ENCODER,
        semantic_decoder: StageConfig = SEMANTIC,
        pixel_decoder: StageConfig = PIXEL,
        latent_dim: int = 32,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_scale: float | tuple[float, ...] = 1.0,
        mask_ratio: float = 0.0,
    ):
        super().__init__()
        low, semantic, pixel = (
            as_dataclass(StageConfig, config) for config in (encoder, semantic_decoder, pixel_decoder)
        )
        height, width = image_sides(image_size)
        if patch_size < 1 or height % patch_size or width % patch_size or min(height, width) < 1:
            raise ValueError(f"image_size {height}x{width} is not a multiple of the patch size {patch_size}")
        if pixel_patch_size < 1 or patch_size % pixel_patch_size:
            raise ValueError(f"pixel_patch_size {pixel_patch_size} must divide patch_size {patch_size}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}")
        self._input_shape, self.patch_size, self.mask_ratio = (in_channels, height, width), patch_size, mask_ratio
        grid = (height // patch_size, width // patch_size)
        self.encoder = LowLevelEncoder(low, grid, patch_size, in_channels, latent_dim, has_mask_token=mask_ratio > 0)
        self.semantic_decoder = SemanticDecoder(semantic, latent_dim)
        ratio = patch_size // pixel_patch_size
        self.pixel_decoder = PixelDecoder(pixel, semantic.dim, ratio, pixel_patch_size, in_channels)
        self.scale = LatentScale(latent_dim, latent_mean, latent_scale)

    @property
    def spec(self) -> TokenSpec:
        return self._spec_of(self.encoder.grid)

    def _spec_of(self, grid: tuple[int, int]) -> TokenSpec:
        return TokenSpec(math.prod(grid), None, self.encoder.latent_dim, grid=grid)

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        if min(sides) < 1 or any(side % self.patch_size for side in sides):
            raise ValueError(
                f"MingTok encodes images of sides in multiples of {self.patch_size}, got {times(sides)}; resize them"
            )
        return self._spec_of((sides[0] // self.patch_size, sides[1] // self.patch_size))

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ()

    @property
    def raster_features(self) -> Mapping[str, int]:
        """ "latents" and "semantic", for frozen encoders of low-level and of semantic features (section 2.2)."""
        return {"latents": self.encoder.latent_dim, "semantic": self.semantic_decoder.norm.normalized_shape[0]}

    @property
    def last_layer(self) -> Tensor:
        return self.pixel_decoder.head.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) to raw latents (B, N + 1, d); the latent of the class token is the last."""
        self.check_pixels(pixels)
        return self.encoder(pixels)

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Pixels to standardised latents (B, N, d) of the patches, in raster order; ``draws`` is unused."""
        self.check_condition(condition)
        return finite_latents(self.scale.standardise(self.latents(pixels)[:, :-1]))

    @property
    def latent_statistics(self) -> Mapping[str, float] | None:
        values = {"latent_mean": self.scale.mean, "latent_scale": self.scale.scale}
        return {name: float(value[0]) for name, value in values.items()} if self.scale.is_uniform else None

    def expander(self) -> SemanticExpander:
        return SemanticExpander(self.semantic_decoder, self.scale, self.spec)

    def semantic_features(self, tokens: Tensor) -> Tensor:
        """Standardised latents (B, N, d) to the semantic features (B, N, D) that a language model reads."""
        return self.expander().expand(tokens)

    def decode(
        self, tokens: Tensor, *, condition: Condition | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Standardised latents (B, N, d) to pixels (B, C, H, W).

        Args:
            grid: (h, w) of the tokens; None is that of ``spec``, or a square for another number of tokens.

        Raises:
            ValueError: tokens of another tokenizer, or a grid that does not hold them.
        """
        self.check_condition(condition)
        return self.paint(self.semantic_features(tokens), grid)

    def paint(self, semantic: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Semantic features (B, N, D) to pixels (B, C, H, W), not clamped; ``grid`` as in ``decode``."""
        return self.pixel_decoder(semantic, self._grid_of(semantic.shape[1], grid))

    def _grid_of(self, count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is None:
            side = math.isqrt(count)
            grid = self.encoder.grid if count == self.spec.length else (side, side)
        if math.prod(grid) != count:
            raise ValueError(f"a grid of {grid[0]}x{grid[1]} does not hold {count} tokens; say which does with grid=…")
        return grid

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """Features "latents" (B, N, d) and "semantic" (B, N, D).

        With masks among the draws, a second pass reads images with masked patches. Its reconstruction "masked" is
        compared at the visible patches; the features are those of this pass and are compared at the masked patches.
        """
        self.check_condition(condition)
        grid = self.check_pixels(pixels).grid
        masked = self._masked(draws)
        raw = self.encoder(pixels)[:, :-1]
        semantic = self.semantic_decoder(raw)
        painted, tokens = self.pixel_decoder(semantic, grid), self.scale.standardise(raw)
        if masked is None:
            return TokenizerOutput(painted, tokens, features={"latents": raw, "semantic": semantic})
        guessed = self.encoder(pixels, masked)[:, :-1]
        features = {"latents": guessed, "semantic": self.semantic_decoder(guessed)}
        seen = (~masked).to(pixels.dtype).unflatten(1, grid)[:, None]  # (B, 1, h, w)
        seen = seen.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)  # (B, 1, H, W)
        hidden = masked.to(pixels.dtype)
        return TokenizerOutput(
            {MAIN: painted, "masked": self.pixel_decoder(features["semantic"], grid)},
            tokens,
            features=features,
            weight_maps={"masked": seen, "latents": hidden, "semantic": hidden},
        )

    def _masked(self, draws: Draws | None) -> Tensor | None:
        """(B, N) bool, True where a patch is masked; None for no masks."""
        if not self.mask_ratio or not draws or "mask" not in draws:
            return None
        ranks = draws["mask"]
        count = ranks.shape[1]
        return ranks < min(max(1, round(self.mask_ratio * count)), max(1, count - 1))

    def training_draws(self, keys: Keys) -> Draws:
        """ "mask" (B, N): a rank for each patch; the lowest ranks are masked."""
        return {"mask": keys.permutation("mask", self.spec.length)} if self.mask_ratio else {}

    @torch.no_grad()
    def standardise(self, pixels: Tensor) -> None:
        """Set one mean and one scale for all channels, as in the released model."""
        raw = torch.cat([self.latents(part)[:, :-1] for part in pixels.split(8)]).double()
        statistics = {"latent_mean": raw.mean().item(), "latent_scale": 1 / max(raw.std().item(), 1e-6)}
        device = self.scale.mean.device
        self.scale = LatentScale(self.encoder.latent_dim, *statistics.values()).to(device)
        self.change_arguments(**statistics)

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return official.own_keys(state)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, official.WITHOUT_EFFECT)
        arguments = official.arguments(given)
        given.finish()
        return cls(**arguments).with_official_weights(official.our_names(state_dict))
