"""LARP: clips as ordered holistic tokens, computed by learned queries that attend to all patches.

Paper: LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior (arXiv 2410.21264, ICLR 2025). Official
weights and conventions: github.com/hywang66/LARP (MIT). The prior that orders the tokens is a loss of training,
``vistok.losses.ARPrior``; the generator is ``vistok.generators.llama`` with learned positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.nn.initialisation import xavier_uniform
from vistok.nn.vit import TransformerSize
from vistok.quantizers import StochasticQuantizer, VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.larp import official
from vistok.tokenizers.larp.networks import Decoder, Encoder, LatentNorm, NormOfLatents, Table
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.sides import image_sides, times

TYPES = ("patches", "queries", "latents", "patch_queries")
L = {"dim": 768, "num_layers": 12, "num_heads": 12}


class LARP(Tokenizer):
    """Clips to a sequence of ids. The networks work on pixels in [0, 1]; public pixels are in [-1, 1].

    A shorter clip, of a multiple of ``temporal_patch_size`` frames, has the same number of tokens; ``decode`` then
    needs ``num_frames``.

    Args:
        num_frames: frames of the longest clip.
        image_size: side of the frames, or (height, width).
        temporal_patch_size: frames of a patch.
        patch_size: side of a patch, or (height, width).
        num_tokens: tokens of a clip, one per query.
        encoder, decoder: the two transformers.
        codebook_size: number of codes.
        codebook_dim: channels of a code.
        codebook_l2_norm: compare and decode l2-normalised codes.
        assignment: "stochastic" draws codes in training (``StochasticQuantizer``); "nearest" takes the nearest code.
        temperature: of the stochastic assignment, or "learned".
        entropy_temperature: softmax temperature of the "entropy" loss term, for ``assignment`` "nearest"; None leaves
            the term out.
        latent_norm: norm before the quantizer, see ``NormOfLatents``; "none" in the paper.
        patch_positions, latent_positions, patch_query_positions: "fixed" sines and cosines, or "learned" tables.
        latent_position_base: base of the frequencies of the latents' fixed positions.
        learned_queries: whether the encoder's queries are trained.
        query_init: "normal" with standard deviation ``query_std``, or "sincos" of the query's index.
        types: kinds of tokens that get a learned type embedding, of "patches", "queries", "latents", "patch_queries".
        norm_eps: eps of the blocks' LayerNorms. The released weights were trained with 1e-5.
        in_channels: 3, or 1 for grey clips.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: sizes that patches do not divide, or an unknown option.
    """

    registry_name = "larp"
    tiny = {
        "num_frames": 4,
        "image_size": 8,
        "temporal_patch_size": 2,
        "patch_size": 4,
        "num_tokens": 6,
        "encoder": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "decoder": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "codebook_size": 32,
        "codebook_dim": 4,
    }
    native_range = (0.0, 1.0)
    data_arguments: ClassVar[Mapping[str, str]] = {**Tokenizer.data_arguments, "num_frames": "num_frames"}
    sizes = {"L": {"encoder": L, "decoder": L}}
    checkpoints = official.CHECKPOINTS

    def __init__(
        self,
        num_frames: int = 16,
        image_size: int | tuple[int, int] = 128,
        temporal_patch_size: int = 4,
        patch_size: int | tuple[int, int] = 8,
        num_tokens: int = 1024,
        encoder: TransformerSize = TransformerSize(**L),  # noqa: B008 (immutable)
        decoder: TransformerSize = TransformerSize(**L),  # noqa: B008 (immutable)
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        codebook_l2_norm: bool = True,
        assignment: Literal["stochastic", "nearest"] = "stochastic",
        temperature: float | Literal["learned"] = 0.03,
        entropy_temperature: float | None = None,
        latent_norm: LatentNorm = "none",
        patch_positions: Table = "fixed",
        latent_positions: Table = "fixed",
        patch_query_positions: Table = "fixed",
        latent_position_base: float = 10000.0,
        learned_queries: bool = True,
        query_init: Literal["normal", "sincos"] = "normal",
        query_std: float = 0.02,
        types: Sequence[str] = ("patch_queries",),
        norm_eps: float = 1e-5,
        in_channels: int = 3,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        encoder, decoder = as_dataclass(TransformerSize, encoder), as_dataclass(TransformerSize, decoder)
        for name, value, allowed in (
            ("assignment", assignment, ("stochastic", "nearest")),
            ("query_init", query_init, ("normal", "sincos")),
            ("patch_positions", patch_positions, ("fixed", "learned")),
            ("latent_positions", latent_positions, ("fixed", "learned")),
            ("patch_query_positions", patch_query_positions, ("fixed", "learned")),
            *(("types", name, TYPES) for name in types),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
        sides = (num_frames, *image_sides(image_size))
        self.patch = (temporal_patch_size, *image_sides(patch_size))
        if any(side % patch for side, patch in zip(sides, self.patch)) or min(sides) < 1:
            raise ValueError(
                f"a clip of {times(sides)} (frames x height x width) is no multiple of patches of {times(self.patch)}"
            )
        t, h, w = (side // patch for side, patch in zip(sides, self.patch))
        self.grid = (t, h, w)
        self._input_shape = (in_channels, *sides)
        self.num_tokens = num_tokens
        self.encoder = Encoder(
            encoder,
            self.grid,
            self.patch,
            num_tokens,
            in_channels=in_channels,
            positions=patch_positions,
            learned_queries=learned_queries,
            query_init=query_init,
            query_std=query_std,
            typed=frozenset(types),
            norm_eps=norm_eps,
        )
        self.pre_quant = nn.Linear(encoder.dim, codebook_dim)
        self.latent_norm = None if latent_norm == "none" else NormOfLatents(latent_norm, num_tokens, codebook_dim)

        def own_quantizer() -> StochasticQuantizer | VectorQuantizer:
            if assignment == "stochastic":
                return StochasticQuantizer(
                    codebook_size, codebook_dim, normalize=codebook_l2_norm, temperature=temperature
                )
            nearest = VectorQuantizer(
                codebook_size,
                codebook_dim,
                normalize=codebook_l2_norm,
                gradient="normalised",
                entropy_temperature=entropy_temperature,
            )
            nn.init.kaiming_uniform_(nearest.embedding.weight)
            return nearest

        self.quantizer = chosen_quantizer(quantizer, codebook_dim, own_quantizer)
        self._spec = spec_of(self.quantizer, TokenSpec(num_tokens, self.quantizer.codebook_size, codebook_dim))
        self.post_quant = nn.Linear(codebook_dim, decoder.dim)
        self.decoder = Decoder(
            decoder,
            self.grid,
            self.patch,
            num_tokens,
            out_channels=in_channels,
            positions=patch_query_positions,
            latent_positions=latent_positions,
            latent_position_base=latent_position_base,
            typed=frozenset(types),
            norm_eps=norm_eps,
        )
        self.apply(xavier_uniform)
        # The first reconstruction is black.
        nn.init.zeros_(self.decoder.to_pixels.weight)

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        """Shorter clips have the same TokenSpec."""
        self._time_steps(sides[0])
        return super()._spec_for_sides((self._input_shape[1], *sides[1:]))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.to_pixels.weight

    def read(self, pixels: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) in [-1, 1] to the encoder's outputs at its queries, (B, n, D)."""
        self.check_pixels(pixels)
        return self.encoder(self.to_native(pixels))

    def latents(self, pixels: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) in [-1, 1] to latents (B, n, d), before quantization."""
        latents = self.pre_quant(self.read(pixels))
        return latents if self.latent_norm is None else self.latent_norm(latents)

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Clips (B, C, T, H, W) in [-1, 1] to ids (B, n).

        Args:
            draws: from ``training_draws``, to draw codes as in training; None takes the most likely codes.
        """
        self.check_condition(condition)
        latents = self.latents(pixels)
        return self.quantize(latents) if draws is None else self.quantizer(latents, draws=draws).ids

    def decode(self, tokens: Tensor, *, condition: Condition | None = None, num_frames: int | None = None) -> Tensor:
        """Ids (B, n), or multi-scale ids (see ``dequantize``), to clips (B, C, T, H, W) in [-1, 1], up to overshoot.

        Args:
            num_frames: frames T of the encoded clip; None is the longest clip.

        Raises:
            ValueError: ids out of range, not n of them, or another number of frames than clips can have.
        """
        self.check_condition(condition)
        return self.decode_latents(self.dequantize(tokens), num_frames=num_frames)

    def decode_latents(self, quantized: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Codes (B, n, d) to clips (B, C, T, H, W) in [-1, 1], up to overshoot."""
        steps = self._time_steps(self._input_shape[1] if num_frames is None else num_frames)
        return self.from_native(self.decoder(self.post_quant(quantized.to(self.dtype)), steps))

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """The training pass. Features: "latents" (B, n, d) and "quantized", the codes (B, n, d)."""
        self.check_condition(condition)
        latents = self.latents(pixels)
        quantized = self.quantizer(latents, draws=draws)
        reconstruction = self.decode_latents(quantized.quantized, num_frames=pixels.shape[2])
        features = {"latents": latents, "quantized": quantized.quantized}
        return TokenizerOutput(reconstruction, quantized.ids, quantized.losses, features)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor, *, condition: Condition | None = None) -> Tensor:
        tokens = self.encode(pixels, condition=condition)
        return self.decode(tokens, num_frames=pixels.shape[2]).clamp(-1, 1)

    def _time_steps(self, num_frames: int) -> int:
        """The number of patches in time of a clip of ``num_frames`` frames."""
        longest, patch = self._input_shape[1], self.patch[0]
        if not 1 <= num_frames <= longest or num_frames % patch:
            raise ValueError(
                f"this tokenizer takes clips of up to {longest} frames, a multiple of {patch}, got {num_frames}; cut "
                "the clip, or repeat its last frame"
            )
        return num_frames // patch

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return official.build_tokenizer(cls, config, state_dict)
