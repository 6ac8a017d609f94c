"""The contract of every tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from vistok.draws import Draws, Keys
from vistok.hub import Model
from vistok.types import TokenizerOutput, TokenSpec


class Tokenizer(Model):
    """Pixels to tokens and back.

    Public pixels are float (B, C, H, W), or (B, C, T, H, W) for video, in [-1, 1]. ``native_range`` is the range in
    which the reference works: pixel, perceptual and GAN losses run there, so that recipes keep their meaning.
    """

    native_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    reconstructs: ClassVar[bool] = True
    """Whether ``forward`` gives a reconstruction, so that pixel losses and a GAN can apply."""

    @property
    @abstractmethod
    def spec(self) -> TokenSpec:
        """The tokens of one image at the size that the tokenizer was built for."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """The pixels that ``spec`` belongs to, without the batch: (C, H, W) or (C, T, H, W)."""

    def spec_for(self, size: tuple[int, int]) -> TokenSpec:
        """The tokens of an image of ``size`` (height, width).

        Raises:
            ValueError: the tokenizer cannot encode that size.
        """
        if tuple(size) != self.image_shape[-2:]:
            raise ValueError(
                f"{type(self).__name__} encodes images of {self.image_shape[-2]}x{self.image_shape[-1]} only, "
                f"got {size[0]}x{size[1]}; resize them first"
            )
        return self.spec

    @abstractmethod
    def encode(self, pixels: Tensor, *, draws: Draws | None = None) -> Tensor:
        """Pixels in [-1, 1] to tokens: (B, L[, depth]) int64 ids, or (B, L, D) standardised latents.

        Deterministic without ``draws`` (nearest code, posterior mode).
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to pixels, in [-1, 1] up to overshoot (not clamped).

        Subclasses add the keyword arguments that their decoder has: ``lengths`` (B,) for prefixes, ``grid`` for other
        image sizes, ``context``, ``draws``, ``num_steps``, ``guidance_scale``.
        """

    @abstractmethod
    def forward(
        self, pixels: Tensor, *, target: Tensor | None = None, step: int | None = None, draws: Draws | None = None
    ) -> TokenizerOutput:
        """The training pass: encode, quantize, decode, with losses and features.

        Args:
            target: pixels to reconstruct where they differ from the input (masked or perturbed inputs).
            step: the optimisation step, for parts with a schedule.
            draws: from ``training_draws``, for parts that are random in training.
        """

    def training_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``forward`` consumes in training; most tokenizers need none."""
        return {}

    def standardise(self, pixels: Tensor) -> None:  # noqa: B027 - discrete tokenizers have nothing to do
        """Set the mean and the scale of continuous latents from example images (B, C, H, W); done after training."""

    @property
    @abstractmethod
    def loss_terms(self) -> tuple[str, ...]:
        """The names of the terms in ``TokenizerOutput.losses``: what an objective can weight."""

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, whose gradients balance the adaptive GAN weight (VQGAN, arXiv 2012.09841, eq. 7).

        Raises:
            ValueError: this decoder has no single last layer.
        """
        raise ValueError(f"{type(self).__name__} names no last layer; use a fixed GAN weight")

    def to_native(self, pixels: Tensor) -> Tensor:
        """[-1, 1] pixels to the reference's range."""
        low, high = self.native_range
        return pixels if (low, high) == (-1.0, 1.0) else (pixels + 1) * ((high - low) / 2) + low

    def from_native(self, pixels: Tensor) -> Tensor:
        """Pixels of the reference's range to [-1, 1]."""
        low, high = self.native_range
        return pixels if (low, high) == (-1.0, 1.0) else (pixels - low) * (2 / (high - low)) - 1

    def check_pixels(self, pixels: Tensor) -> TokenSpec:
        """Check shape and type of a batch of public pixels and return its TokenSpec.

        Raises:
            ValueError: wrong rank, channels, size or dtype.
        """
        expected = self.image_shape
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be float in [-1, 1], got {pixels.dtype}; divide uint8 by 127.5, subtract 1")
        if pixels.ndim != len(expected) + 1:
            raise ValueError(f"pixels must be (B, {', '.join(map(str, expected))}), got shape {tuple(pixels.shape)}")
        if pixels.shape[1] != expected[0]:
            remedy = "repeat the grey channel" if expected[0] == 3 else "convert the images to grey"
            raise ValueError(f"this tokenizer reads {expected[0]} channels, got {pixels.shape[1]}; {remedy}")
        return self.spec_for((pixels.shape[-2], pixels.shape[-1]))

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Encode and decode; what a user sees, clamped to [-1, 1]."""
        return self.decode(self.encode(pixels)).clamp(-1, 1)
