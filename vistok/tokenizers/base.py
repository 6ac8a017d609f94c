"""The contract of every tokenizer."""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from vistok.checkpoints import Model
from vistok.draws import Draws, Keys
from vistok.quantizers.gaussian import GaussianLatents
from vistok.quantizers.scaled import PackedBSQ, ScaledQuantizer
from vistok.signatures import ConfigError
from vistok.types import (
    Clock,
    Condition,
    ConditionSpec,
    DrawsInTraining,
    Expander,
    TokenizerOutput,
    TokenSpec,
    check_tensor,
)
from vistok.utils.finite import finite_latents
from vistok.utils.sides import times

if TYPE_CHECKING:
    from vistok.data.config import DataConfig

LETTERS = {3: "C, H, W", 4: "C, T, H, W"}


class Tokenizer(Model):
    """Base class of tokenizers: encodes pixels to tokens, and decodes tokens.

    Public pixels are float (B, C, H, W), or (B, C, T, H, W) for video, in [-1, 1]. ``native_range`` is the range of
    the reference implementation: pixel, perceptual and GAN losses run in it, so that weights of published recipes keep
    their meaning.

    A tokenizer whose tokens decode to something other than pixels sets ``renders`` to False.
    """

    data_arguments: ClassVar[Mapping[str, str]] = {"image_size": "image_size", "in_channels": "channels"}
    """Constructor arguments that come from the ``data`` section, each with its key there. Video tokenizers add
    ``num_frames``."""

    native_range: tuple[float, float] = (-1.0, 1.0)
    renders: bool = True
    """Whether ``decode`` makes pixels."""
    reconstructs: bool = True
    """Whether ``forward`` gives a reconstruction, so that pixel losses and a GAN can apply."""
    embeds: bool = False
    """Whether ``decode_features`` makes image embeddings."""
    encoding_parts: tuple[str, ...] = ("encoder.*", "pre_quant.*", "quantizer.*")
    """Name patterns of all parameters that ``encode`` depends on. Freezing them trains the decoder alone."""
    quantizer: Any
    """The quantizer of a discrete tokenizer, a module of ``vistok.quantizers``."""
    has_posterior: bool = False
    """Whether the encoder predicts a distribution of latents, whose moments ``encode_moments`` returns."""
    gaussian: GaussianLatents
    """Posterior and standardisation of the latents, if the tokenizer ``has_posterior``."""

    _spec: TokenSpec
    _input_shape: tuple[int, ...]

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image or clip of the size that the tokenizer was built for."""
        return self._spec

    @classmethod
    def arguments_from(cls, data: DataConfig) -> dict[str, Any]:
        """The constructor arguments that come from ``data``.

        Raises:
            ConfigError: clips for an image tokenizer, or images for a video tokenizer.
        """
        reads_clips = "num_frames" in cls.data_arguments.values()
        if reads_clips and data.num_frames is None:
            raise ConfigError(f"{cls.registry_name} reads clips: set data.num_frames, for example data.num_frames=16")
        if data.num_frames is not None and not reads_clips:
            raise ConfigError(f"{cls.registry_name} reads images, not clips: leave data.num_frames out")
        return {argument: getattr(data, key) for argument, key in cls.data_arguments.items()}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the pixels that ``spec`` describes, without the batch axis: (C, H, W) or (C, T, H, W)."""
        return self._input_shape

    def spec_for(self, shape: Sequence[int]) -> TokenSpec:
        """The TokenSpec of pixels of ``shape``, without the batch axis: (C, H, W) or (C, T, H, W).

        Raises:
            ValueError: the tokenizer cannot encode that shape.
        """
        expected, shape = self.input_shape, tuple(shape)
        if len(shape) != len(expected):
            raise ValueError(f"pixels must be ({LETTERS[len(expected)]}) like {expected}, got {shape}")
        if shape[0] != expected[0]:
            raise ValueError(f"this tokenizer reads {expected[0]} channels, got {shape[0]}; {_remedy(shape, expected)}")
        return self._spec_for_sides(shape[1:])

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        """The TokenSpec of pixels with sides (H, W) or (T, H, W). Tokenizers that encode several sizes override it."""
        own = self.input_shape[1:]
        if sides != own:
            what = "images" if len(own) == 2 else "clips (frames x height x width)"
            remedy = "resize them" if sides[-2:] != own[-2:] else f"take {own[0]} frames"
            raise ValueError(
                f"{type(self).__name__} encodes {what} of {times(own)} only, got {times(sides)}; {remedy} first"
            )
        return self.spec

    @property
    def condition_spec(self) -> ConditionSpec:
        """What ``encode``, ``decode`` and ``forward`` can be conditioned on: nothing, unless the tokenizer says so."""
        return ConditionSpec()

    @property
    def latent_statistics(self) -> Mapping[str, float] | None:
        """Mean and scale that latents are standardised with, by argument name, one number each for all channels. None
        if there are no such numbers."""
        return None

    @abstractmethod
    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Pixels in [-1, 1] to tokens: (B, L[, depth]) int64 ids, or (B, L, D) standardised latents.

        Deterministic without ``draws`` (nearest code, posterior mode).
        """

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of the latents before standardisation, (B, L, D) each. A tokenizer that
        ``has_posterior`` overrides it.

        Raises:
            ValueError: the tokenizer has no posterior.
        """
        raise ValueError(f"the tokens of {type(self).__name__} have no posterior; use encode")

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Means and log-variances of the standardised latents, (B, L, 2D).

        Raises:
            ValueError: the tokenizer has no posterior.
        """
        mean, log_variance = self.moments(pixels)
        return self.gaussian.standardised_moments(mean, log_variance)

    @property
    def corrects_bits(self) -> bool:
        """Whether ids pack the bits of several scales (``PackedBSQ``), as bitwise self-correction needs."""
        quantizer = getattr(self, "quantizer", None)
        return isinstance(quantizer, ScaledQuantizer) and isinstance(quantizer.of_maps, PackedBSQ)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Pixels to the latents (B, h * w, D), in raster order, that a multi-scale quantizer reads.

        Raises:
            ValueError: the quantizer has no scales.
        """
        if not isinstance(getattr(self, "quantizer", None), ScaledQuantizer):
            raise ValueError(f"the quantizer of {type(self).__name__} has no scales; use encode")
        latents: Any = self.latents  # defined by tokenizers that take multi-scale quantizers
        return latents(pixels)

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Tokens to pixels, in [-1, 1] up to overshoot (not clamped).

        Subclasses add the keyword arguments that their decoder has: ``lengths`` (B,) for prefixes, ``grid`` for other
        image sizes, ``context``, ``draws``, ``num_steps``, ``guidance_scale``.

        Raises:
            ValueError: this tokenizer renders no pixels.
        """
        self.check_renders("decode")
        raise NotImplementedError(f"{type(self).__name__} renders, but defines no decode")

    @abstractmethod
    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """The training pass: encode, quantize, decode, with losses and features.

        Args:
            condition: what the tokenizer is conditioned on, where ``condition_spec`` has parts.
            target: pixels to reconstruct where they differ from the input (masked or perturbed inputs).
            clock: where training stands, for parts with a schedule.
            draws: from ``training_draws``, for parts that are random in training.
        """

    def quantize(self, latents: Tensor) -> Tensor:
        """Ids (B, L[, depth]) of latents (B, L, D), or of a map (B, D, h, w) if the quantizer reads maps.

        Raises:
            ValueError: latents that are not finite, for which any id would be wrong.
        """
        ids: Tensor = self.quantizer.encode(finite_latents(latents))
        return ids

    def dequantize(self, tokens: Tensor, length: int | None = None) -> Tensor:
        """Ids (B, L[, depth]) to the quantized latents (B, L, D) that the decoder reads, in the model's dtype.

        Multi-scale tokens may be ids (B, n) of the first scales only, or code vectors (B, n, D), which smooth sampling
        returns.

        Args:
            length: the required number of ids; None is ``spec.length``. Multi-scale tokens ignore it.

        Raises:
            ValueError: ids out of range, or another number of them.
        """
        if self.spec.scales:
            self.check_scaled(tokens)
        else:
            self.spec.check_ids(tokens)
            length = self.spec.length if length is None else length
            if tokens.shape[1] != length:
                raise ValueError(f"this tokenizer decodes {length} tokens at once, got {tokens.shape[1]}")
        latents: Tensor = self.quantizer.ids_to_latents(tokens)
        return latents.to(self.dtype)  # some quantizers return float32

    def check_scaled(self, tokens: Tensor) -> None:
        """Raise ValueError unless multi-scale tokens are ids (B, n) or code vectors (B, n, D)."""
        check_tensor(tokens, "token ids")
        if not tokens.is_floating_point():
            self.spec.check_ids(tokens)
        elif tokens.ndim != 3 or tokens.shape[2] != self.spec.dim:
            raise ValueError(f"code vectors must be (B, n, {self.spec.dim}), got {tuple(tokens.shape)}")

    def expander(self) -> Expander:
        """A new expander, which turns tokens into the inputs of a generator. A multi-scale quantizer gives the sum of
        the scales so far, resized to the next grid.

        Raises:
            ValueError: generators read the tokens of this tokenizer as they are.
        """
        if isinstance(getattr(self, "quantizer", None), ScaledQuantizer):
            return self.quantizer.expander()
        raise ValueError(f"{type(self).__name__} has no expander: generators read its tokens as they are")

    def training_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``forward`` consumes in training: by default "posterior" (B, L, D), normal, if the
        tokenizer ``has_posterior``, else those of the quantizer, if any."""
        if self.has_posterior:
            return {"posterior": keys.normal("posterior", self.spec.length, self.spec.dim)}
        quantizer = getattr(self, "quantizer", None)
        return quantizer.training_draws(keys, self.spec.length) if isinstance(quantizer, DrawsInTraining) else {}

    @torch.no_grad()
    def standardise(self, pixels: Tensor) -> None:
        """Set ``latent_mean`` and ``latent_scale`` from example images (B, C, H, W), after training: samples of the
        posterior then have mean 0 and standard deviation 1 in every channel. Nothing happens without a posterior."""
        if not self.has_posterior:
            return
        parts = [self.moments(part) for part in pixels.split(8)]
        self.gaussian.fit(*(torch.cat(values) for values in zip(*parts)))
        mean, scale = (tuple(values.tolist()) for values in (self.gaussian.mean, self.gaussian.scale))
        self.change_arguments(latent_mean=mean, latent_scale=scale)

    def decoding_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``decode`` consumes, as its argument ``draws``; only generative decoders need any."""
        return {}

    def prefix_decoder(
        self, draws: Draws | None = None, *, condition: Condition | None = None
    ) -> Callable[[Tensor], Tensor]:
        """A function that decodes growing prefixes of one batch: ids (B, k) to pixels, k rising from call to call.

        For tokenizers whose prefixes decode (``spec.prefix_step``).

        Args:
            draws: from ``decoding_draws``.
        """
        options: dict[str, Any] = {"draws": draws} if draws else {}
        return lambda tokens: self.decode(tokens, condition=condition, **options)

    def codes(self) -> Tensor:
        """All code vectors (K, D) in the order of their ids, as they occur in the feature "quantized" of ``forward``.

        Raises:
            ValueError: tokens that are continuous, multi-scale, or several ids per position.
        """
        spec = self.spec
        if not spec.discrete or spec.depth != 1:
            raise ValueError(f"{type(self).__name__} has no codes: its tokens are not one id per position")
        if spec.scales:
            raise ValueError(
                f"{type(self).__name__} has no codes that its quantized map is made of: a place of it is a sum of "
                "several"
            )
        ids = torch.arange(spec.num_ids, device=self.device)
        return self.quantizer.ids_to_latents(ids)

    @property
    def alignment_dim(self) -> int | None:
        """Channels D of the feature "alignment" (B, P, D) of ``forward``: patch features on a square raster, which the
        loss "repa" compares with those of a frozen encoder. None without this feature."""
        return None

    @property
    def predicted_codes(self) -> tuple[int, int] | None:
        """(P, K) of the feature "code_logits" (B, P, K) of ``forward``: logits over the codes of another tokenizer, for
        the loss "code_prediction". None without this feature."""
        return None

    @property
    def semantic_dim(self) -> int | None:
        """Channels of a frozen encoder's features that ``project_semantic`` takes; None without such a projection."""
        return None

    def project_semantic(self, features: Tensor) -> Tensor:
        """Project features (B, ``semantic_dim``) of a frozen encoder to (B, spec.dim) with the projection of the
        latents, for the loss "semantic_contrast".

        Raises:
            ValueError: the tokenizer has no such projection.
        """
        raise ValueError(f"{type(self).__name__} projects no features of a frozen encoder")

    @property
    def summary_features(self) -> Mapping[str, int]:
        """Names of the features (B, L, D) of ``forward`` whose last position summarises the image, each with its D. The
        loss "text_contrast" compares them with texts."""
        return {}

    def decode_features(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) to image embeddings (B, E).

        Raises:
            ValueError: the tokenizer does not decode to embeddings (``embeds`` is False).
        """
        raise ValueError(f"{type(self).__name__} decodes to pixels, not to an image embedding")

    def target_features(self, pixels: Tensor) -> Tensor:
        """The embeddings (B, E) of images (B, C, H, W) in [-1, 1] that are the target of ``decode_features``.

        Raises:
            ValueError: this tokenizer has no network that computes them.
        """
        raise ValueError(f"{type(self).__name__} decodes to pixels, not to an image embedding")

    @property
    def raster_features(self) -> Mapping[str, int]:
        """Names of the features (B, h * w, D) of ``forward`` that lie on a raster of the image, each with its D. The
        loss "semantic" compares them with those of a frozen encoder."""
        return {}

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the terms in ``TokenizerOutput.losses``, which an objective can weight: by default those of the
        quantizer."""
        return self.quantizer.loss_terms

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight; the adaptive GAN weight compares gradients at it (VQGAN, arXiv 2012.09841, eq. 7).

        Raises:
            ValueError: this decoder has no single last layer.
        """
        raise ValueError(f"{type(self).__name__} names no last layer; use a fixed GAN weight")

    def to_native(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to ``native_range``."""
        low, high = self.native_range
        return pixels if (low, high) == (-1.0, 1.0) else (pixels + 1) * ((high - low) / 2) + low

    def from_native(self, pixels: Tensor) -> Tensor:
        """Pixels in ``native_range`` to [-1, 1]."""
        low, high = self.native_range
        return pixels if (low, high) == (-1.0, 1.0) else (pixels - low) * (2 / (high - low)) - 1

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images of any size as pixels (B, C, H, W) in [-1, 1] that ``encode`` reads: upright, ADM's centre crop to
        the tokenizer's size, grey or RGB, on its device and in its precision.

        Raises:
            ValueError: no images, a tokenizer of clips or of images that are not square.
        """
        from vistok.data.pictures import from_pil

        channels, height, width = self.image_shape("reading PIL images")
        several = [images] if isinstance(images, Image.Image) else images
        return from_pil(several, (height, width), channels).to(self.device, self.dtype)

    def check_pixels(self, pixels: Tensor) -> TokenSpec:
        """Check shape and dtype of a batch of public pixels and return its TokenSpec. Outside of training, warn of
        values far outside [-1, 1].

        Raises:
            ValueError: wrong rank, channels, size or dtype.
        """
        expected = self.input_shape
        if not isinstance(pixels, Tensor):
            raise ValueError(f"pixels must be a tensor, got {type(pixels).__name__}; tokenizer.preprocess(…) makes one")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be float in [-1, 1], got {pixels.dtype}; divide uint8 by 127.5, subtract 1")
        if pixels.ndim != len(expected) + 1:
            hint = "; pixels[None] is a batch of one" if pixels.ndim == len(expected) else ""
            raise ValueError(
                f"pixels must be (B, {', '.join(map(str, expected))}), got shape {tuple(pixels.shape)}{hint}"
            )
        if not self.training and pixels.numel():  # training would wait for the device
            _warn_of_range(pixels)
        return self.spec_for(pixels.shape[1:])

    def image_shape(self, purpose: str) -> tuple[int, int, int]:
        """``input_shape`` (C, H, W) of an image tokenizer. ``purpose`` names the caller in the error message.

        Raises:
            ValueError: this tokenizer reads clips.
        """
        if len(self.input_shape) != 3:
            raise ValueError(
                f"{purpose} works on images, but {type(self).__name__} reads clips of {self.input_shape[1]} frames"
            )
        channels, height, width = self.input_shape
        return channels, height, width

    def check_renders(self, purpose: str) -> None:
        """Raise ValueError if ``purpose`` needs pixels and this tokenizer renders none."""
        if not self.renders:
            raise ValueError(f"{type(self).__name__} renders no pixels: {purpose} needs a tokenizer that does")

    def check_condition(self, condition: Condition | None) -> None:
        """Raise ValueError for a condition that does not match ``condition_spec``."""
        if condition is None:
            return
        if not self.condition_spec.parts:
            raise ValueError(f"{type(self).__name__} takes no condition; leave it out")
        self.condition_spec.check(condition, "this tokenizer")

    def own_condition(self, condition: Condition | None) -> Condition | None:
        """The parts of a generator's ``condition`` that this tokenizer takes too; None if there are none."""
        if condition is None:
            return None
        names = self.condition_spec.parts
        parts = {name: part for name, part in condition.parts.items() if name in names}
        return Condition(condition.size, parts, condition.device) if parts else None

    def decode_options(self, spec: TokenSpec) -> dict[str, Any]:
        """The keyword arguments that ``decode`` needs for tokens of ``spec``, such as the grid of another image size.

        Raises:
            ValueError: ``decode`` cannot read such tokens.
        """
        own = self.spec
        names = ("codebook_size", "depth") if own.discrete else ("codebook_size", "dim")
        differing = [name for name in names if getattr(own, name) != getattr(spec, name)]
        if not differing and own.length == spec.length:
            return {}
        if not differing and spec.grid is not None and "grid" in inspect.signature(self.decode).parameters:
            return {"grid": spec.grid}  # a convolutional tokenizer at another image size
        differing = differing or ["length"]
        raise ValueError(
            "the generator models other tokens than this tokenizer makes: "
            + "; ".join(f"{name} {getattr(spec, name)} instead of {getattr(own, name)}" for name in differing)
        )

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Encode and decode pixels; the result is clamped to [-1, 1]."""
        return self.decode(self.encode(pixels, condition=condition), condition=condition).clamp(-1, 1)


OVERSHOOT = 1.5
"""Largest absolute pixel value without a warning: decoders overshoot [-1, 1] a little."""


def _warn_of_range(pixels: Tensor) -> None:
    low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()
    if low < -OVERSHOOT or high > OVERSHOOT:
        warnings.warn(
            f"pixels lie in [{low:.3g}, {high:.3g}], but tokenizers read [-1, 1]: divide 8-bit values by 127.5 and "
            "subtract 1, or let tokenizer.preprocess(…) read PIL images",
            stacklevel=4,
        )


def _remedy(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Advice for pixels of ``shape``, whose number of channels differs from that of ``expected``."""
    if shape[0] not in (1, 3):
        order = LETTERS[len(expected)]
        if len(shape) == 4 and shape[1] == expected[0]:
            return f"time comes first in {shape}, and pixels are ({order}): pixels.transpose(1, 2) of a batch"
        if shape[-1] == expected[0]:
            return f"the channels come last in {shape}, and pixels are ({order}): pixels.movedim(-1, 1) of a batch"
    return "repeat the grey channel" if expected[0] == 3 else "convert the images to grey"
