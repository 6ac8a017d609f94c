"""The contract of every tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from vistok.checkpoints import Model
from vistok.draws import Draws, Keys
from vistok.types import TokenizerOutput, TokenSpec


class Tokenizer(Model):
    """Pixels to tokens and back.

    Public pixels are float (B, C, H, W), or (B, C, T, H, W) for video, in [-1, 1]. ``native_range`` is the range in
    which the reference works: pixel, perceptual and GAN losses run there, so that recipes keep their meaning.
    """

    native_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    reconstructs: ClassVar[bool] = True
    """Whether ``forward`` gives a reconstruction, so that pixel losses and a GAN can apply."""
    has_posterior: ClassVar[bool] = False
    """Whether latents are drawn from a distribution, whose moments ``encode_moments`` gives."""

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

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Means and log-variances of the standardised latents, (B, L, 2D); of tokenizers with a posterior."""
        raise ValueError(f"the tokens of {type(self).__name__} have no posterior; use encode")

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

    def standardise(self, pixels: Tensor) -> None:
        """Set the mean and the scale of continuous latents from example images (B, C, H, W); done after training."""

    def decoding_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``decode`` consumes, as its argument ``draws``; only generative decoders need any."""
        return {}

    def prefix_decoder(self, draws: Draws | None = None) -> Callable[[Tensor], Tensor]:
        """A function that decodes growing prefixes of one batch: ids (B, k) to pixels, k rising from call to call.

        For tokenizers whose prefixes decode (``spec.prefix_step``).

        Args:
            draws: from ``decoding_draws``.
        """
        options = {"draws": draws} if draws else {}
        return lambda tokens: self.decode(tokens, **options)

    @property
    def alignment_dim(self) -> int | None:
        """Channels of the feature "alignment" (B, P, D) that ``forward`` gives: patch features of a square raster, for
        the loss "repa" to compare with those of a frozen encoder. None if there is none."""
        return None

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


def prefix_lengths(spec: TokenSpec, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """How many of its ids each image is decoded from, (B,) int64, for ids (B, k) of a tokenizer of ordered tokens.

    Args:
        lengths: (B,) integers, or None for all k.

    Raises:
        ValueError: ids out of range, or a length that is 0, too long, or no multiple of ``spec.prefix_step``.
    """
    spec.check_ids(tokens)
    given = tokens.shape[1]
    if lengths is None:
        lengths = torch.full((len(tokens),), given, device=tokens.device)
    elif lengths.shape != (len(tokens),) or lengths.is_floating_point():
        raise ValueError(f"lengths must be ({len(tokens)},) integers, got {tuple(lengths.shape)} of {lengths.dtype}")
    lengths = lengths.to(tokens.device, torch.int64)
    step = spec.prefix_step
    wrong = lengths[(lengths < 1) | (lengths > min(given, spec.length)) | (lengths % step != 0)]
    if len(wrong):
        multiples = f"a multiple of {step} " if step > 1 else ""
        raise ValueError(
            f"cannot decode {int(wrong[0])} tokens of {given} given: a prefix has {multiples}from {step} to "
            f"{spec.length} tokens"
        )
    return lengths
