"""Image tokenizers applied to clips frame by frame, so that they can be compared with video tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor

from vistok.checkpoints import registry
from vistok.draws import Draws, Keys
from vistok.quantizers.gaussian import GaussianLatents
from vistok.tokenizers.base import Tokenizer
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, check_tensor


class Framewise(Tokenizer):
    """An image tokenizer that encodes each frame of a clip by itself; the tokens of the first frame come first.

    Args:
        num_frames: frames T of a clip.
        tokenizer: ``name`` of an image tokenizer, and its arguments.

    Raises:
        ValueError: ``num_frames`` below 1, no ``name``, a video tokenizer, or a multi-scale one.
    """

    registry_name = "framewise"
    tiny = {
        "num_frames": 2,
        "tokenizer": {
            "name": "vit_vqgan",
            "image_size": 8,
            "patch_size": 4,
            "encoder": {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32},
            "decoder": {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32},
            "codebook_size": 32,
            "codebook_embed_dim": 4,
        },
    }
    data_arguments: ClassVar[Mapping[str, str]] = {"num_frames": "num_frames"}

    def __init__(self, num_frames: int, tokenizer: Mapping[str, Any]):
        super().__init__()
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        arguments = dict(tokenizer)
        name = arguments.pop("name", None)
        if name is None:
            raise ValueError("tokenizer needs the name of an image tokenizer, such as {name: …, image_size: 64}")
        self.num_frames = num_frames
        self._wrap(registry.entry(name, "tokenizer").load()(**arguments))

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_frames: int) -> Self:
        """Wrap a trained image tokenizer; the result shares its weights."""
        with torch.device("meta"):
            wrapped = cls(num_frames, _section(tokenizer))
        wrapped._wrap(tokenizer)
        return wrapped.train(tokenizer.training)

    def _wrap(self, tokenizer: Tokenizer) -> None:
        tokenizer.image_shape("framewise")
        if tokenizer.spec.scales:
            raise ValueError(
                f"{tokenizer.registry_name} has tokens of several scales, whose order is not that of frames"
            )
        self.tokenizer = tokenizer
        self.native_range, self.renders = tokenizer.native_range, tokenizer.renders
        self.reconstructs = tokenizer.reconstructs
        self.has_posterior = tokenizer.has_posterior
        self.encoding_parts = tuple(f"tokenizer.{part}" for part in tokenizer.encoding_parts)

    @property
    def spec(self) -> TokenSpec:
        frame = self.tokenizer.spec
        return TokenSpec(
            frame.length * self.num_frames,
            frame.codebook_size,
            frame.dim,
            depth=frame.depth,
            grid=None if frame.grid is None else (self.num_frames, *frame.grid),
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        channels, height, width = self.tokenizer.input_shape
        return channels, self.num_frames, height, width

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return self.tokenizer.loss_terms

    @property
    def gaussian(self) -> GaussianLatents:  # type: ignore[override]  # as an attribute, its weights would be saved twice
        return self.tokenizer.gaussian

    @property
    def latent_statistics(self) -> Mapping[str, float] | None:
        return self.tokenizer.latent_statistics

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.last_layer

    def codes(self) -> Tensor:
        return self.tokenizer.codes()

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        self.check_pixels(pixels)
        return self._joined(self.tokenizer.encode(_frames(pixels), draws=_of_frames(draws)), len(pixels))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_pixels(pixels)
        mean, log_variance = self.tokenizer.moments(_frames(pixels))
        return self._joined(mean, len(pixels)), self._joined(log_variance, len(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Tokens (B, T * L[, …]) to clips (B, C, T, H, W).

        Args:
            draws: from ``decoding_draws``, for generative decoders.

        Raises:
            ValueError: another number of tokens, or ids out of range.
        """
        self.check_condition(condition)
        check_tensor(tokens, "tokens")
        if tokens.shape[1] != self.spec.length:
            raise ValueError(
                f"{self.num_frames} frames have {self.spec.length} tokens, {self.tokenizer.spec.length} each, got "
                f"{tokens.shape[1]}"
            )
        options: dict[str, Any] = {} if draws is None else {"draws": _of_frames(draws)}
        frames = tokens.unflatten(1, (self.num_frames, -1)).flatten(0, 1)  # (B * T, L[, …])
        return _clips(self.tokenizer.decode(frames, **options), len(tokens))

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """The image tokenizer's training pass over all frames. Only features of shape (B, L, D) are kept."""
        self.check_condition(condition)
        self.check_pixels(pixels)
        output = self.tokenizer(
            _frames(pixels),
            target=None if target is None else _frames(target),
            clock=clock,
            draws=_of_frames(draws),
        )
        count = len(pixels)
        return TokenizerOutput(
            {name: _clips(frames, count) for name, frames in output.reconstructions.items()},
            self._joined(output.tokens, count),
            {name: self._joined(t, count) if t.ndim > 1 else t for name, t in output.losses.items()},
            {name: self._joined(t, count) for name, t in output.features.items() if t.ndim == 3},
        )

    def training_draws(self, keys: Keys) -> Draws:
        return self._draws(self.tokenizer.training_draws, keys)

    def decoding_draws(self, keys: Keys) -> Draws:
        return self._draws(self.tokenizer.decoding_draws, keys)

    def standardise(self, pixels: Tensor) -> None:
        self.tokenizer.standardise(_frames(pixels))
        self.change_arguments(tokenizer=_section(self.tokenizer))

    def _draws(self, make: Callable[[Keys], Draws], keys: Keys) -> Draws:
        """Draws (B, T, …), with keys of its own for every frame."""
        indices = [index * self.num_frames + frame for index in keys.indices for frame in range(self.num_frames)]
        draws = make(keys.at(indices))
        return {name: value.unflatten(0, (len(keys), self.num_frames)) for name, value in draws.items()}

    def _joined(self, values: Tensor, count: int) -> Tensor:
        """(B * T, L, …) of frames to (B, T * L, …) of clips."""
        return values.unflatten(0, (count, self.num_frames)).flatten(1, 2)


def _section(tokenizer: Tokenizer) -> dict[str, Any]:
    """The argument ``tokenizer`` that builds ``tokenizer``."""
    return {"name": tokenizer.registry_name, **tokenizer.config}


def _frames(pixels: Tensor) -> Tensor:
    return rearrange(pixels, "b c t h w -> (b t) c h w")


def _clips(pixels: Tensor, count: int) -> Tensor:
    return rearrange(pixels, "(b t) c h w -> b c t h w", b=count)


def _of_frames(draws: Draws | None) -> Draws | None:
    """Draws (B, T, …) of clips as those (B * T, …) of frames."""
    return None if draws is None else {name: value.flatten(0, 1) for name, value in draws.items()}
