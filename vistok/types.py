"""The small value types that tokenizers, quantizers and generators exchange.

They carry tensors and names, and no behaviour of a particular system. Letters in shapes: B batch, L tokens,
D width, N residual depth, C channels, H W image sides.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from vistok.conditions import Condition, ConditionSpec, FeatureSpec, IdSpec
from vistok.draws import Draws, Keys

__all__ = [
    "Clock",
    "Condition",
    "ConditionSpec",
    "FeatureSpec",
    "GeneratorOutput",
    "IdSpec",
    "JointVocabulary",
    "QuantizerOutput",
    "TokenChunk",
    "TokenKind",
    "TokenSpec",
    "TokenizerOutput",
    "as_dataclass",
    "to_json",
]


@dataclass(frozen=True)
class TokenSpec:
    """What a generator has to know about a tokenizer: the shape and the vocabulary of its tokens.

    Attributes:
        length: tokens per image (or clip).
        codebook_size: number of ids, or None for continuous latents.
        dim: channels of one token's latent vector.
        depth: ids per position; 1 unless the quantizer is residual.
        grid: (h, w) or (t, h, w) if tokens lie on a raster, None for a plain sequence.
        scales: one grid per scale for multi-scale tokenizers, else empty.
        prefix_step: k if every prefix of a multiple of k tokens decodes; None if only whole sequences do.

    Raises:
        ValueError: the grid, or the scales together, do not hold ``length`` tokens; sides that are not whole numbers of
            at least 1; or scales that are not ordered from small to large.
    """

    length: int
    codebook_size: int | None
    dim: int
    depth: int = 1
    grid: tuple[int, ...] | None = None
    scales: tuple[tuple[int, ...], ...] = ()
    prefix_step: int | None = None

    def __post_init__(self) -> None:
        # A spec read from JSON holds lists; it must equal the spec that was saved.
        if self.grid is not None:
            object.__setattr__(self, "grid", _sides("grid", self.grid))
        if not isinstance(self.scales, list | tuple):
            raise ValueError(f"scales must be a grid for each scale, got {self.scales!r}")
        scales = tuple(_sides("each of the scales", scale) for scale in self.scales)
        object.__setattr__(self, "scales", check_growth(scales))
        if self.grid is not None and math.prod(self.grid) != self.length:
            raise ValueError(f"grid {self.grid} holds {math.prod(self.grid)} tokens, but length is {self.length}")
        if self.scales and sum(map(math.prod, self.scales)) != self.length:
            total = sum(map(math.prod, self.scales))
            raise ValueError(f"scales {self.scales} hold {total} tokens, but length is {self.length}")

    @property
    def prefixes_decode(self) -> bool:
        """Whether proper prefixes decode: of ordered tokens, or the first of several scales."""
        return self.prefix_step is not None or bool(self.scales)

    def prefix_lengths(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Check the prefix lengths of ordered ids (B, k) and return them as (B,) int64.

        Args:
            lengths: (B,) integers, the number of ids that each image is decoded from; None for all k.

        Raises:
            ValueError: an id is out of range, there are more ids than an image has, or a length is 0, too long, or no
                multiple of ``prefix_step``.
        """
        self.check_ids(tokens)
        given = tokens.shape[1]
        if lengths is None:
            lengths = torch.full((len(tokens),), given, device=tokens.device)
        elif lengths.shape != (len(tokens),) or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be ({len(tokens)},) integers, got {tuple(lengths.shape)} of {lengths.dtype}"
            )
        lengths = lengths.to(tokens.device, torch.int64)
        step = self.prefix_step or self.length
        multiples = f"a multiple of {step} " if step > 1 else ""
        allowed = f"a prefix has {multiples}from {step} to {self.length} tokens"
        if given > self.length:
            raise ValueError(f"cannot decode {given} tokens: {allowed}")
        wrong = lengths[(lengths < 1) | (lengths > given) | (lengths % step != 0)]
        if len(wrong):
            raise ValueError(f"cannot decode {int(wrong[0])} tokens of {given} given: {allowed}")
        return lengths

    def decodable(self, count: int) -> int:
        """The length of the longest prefix of at most ``count`` tokens that decodes; 0 if none does."""
        if self.prefix_step is not None:
            return count - count % self.prefix_step
        ends = accumulate(map(math.prod, self.scales)) if self.scales else (self.length,)
        return max((end for end in ends if end <= count), default=0)

    @property
    def discrete(self) -> bool:
        return self.codebook_size is not None

    @property
    def raster(self) -> tuple[int, ...]:
        """The grid. Raises ValueError for a plain sequence."""
        if self.grid is None:
            raise ValueError("these tokens lie on no raster")
        return self.grid

    @property
    def num_ids(self) -> int:
        """The codebook size of discrete tokens. Raises ValueError for continuous latents."""
        if self.codebook_size is None:
            raise ValueError("this tokenizer has continuous latents, which have no ids")
        return self.codebook_size

    def check_ids(self, ids: Tensor) -> Tensor:
        """Return ``ids`` if they are (B, n[, depth]) integers of this vocabulary; else raise ValueError.

        The range check makes the host wait for the tensor, so call it where ids enter, not in a loop.
        """
        if not self.discrete:
            raise ValueError("this tokenizer has continuous latents; it takes no ids")
        check_tensor(ids, "token ids")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"token ids must be integers, got {ids.dtype}; continuous latents do not fit this codebook"
            )
        expected = "(B, n)" if self.depth == 1 else f"(B, n, {self.depth})"
        if ids.ndim != (2 if self.depth == 1 else 3) or (self.depth > 1 and ids.shape[2] != self.depth):
            raise ValueError(f"token ids must have shape {expected}, got {tuple(ids.shape)}")
        if ids.numel():
            low, high = torch.stack(torch.aminmax(ids)).tolist()
            if low < 0 or high >= self.num_ids:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"token id {wrong} is out of range: this codebook has ids 0..{self.num_ids - 1}; "
                    "were these tokens made by another tokenizer?"
                )
        return ids

    def check_latents(self, latents: Tensor) -> Tensor:
        """Return ``latents`` if they are (B, n, dim) floats and the tokens continuous; else raise ValueError."""
        if self.discrete:
            raise ValueError(f"these tokens are ids of a codebook of {self.codebook_size}, not latents")
        check_tensor(latents, "latents")
        if not latents.is_floating_point():
            raise ValueError(f"latents must be float, got {latents.dtype}; are these ids of another tokenizer?")
        if latents.ndim != 3 or latents.shape[2] != self.dim:
            raise ValueError(
                f"latents must be (B, n, {self.dim}), got {tuple(latents.shape)}; were they made by another tokenizer?"
            )
        return latents


def check_tensor(tokens: Any, what: str) -> None:
    """Raise ValueError unless ``tokens`` is a tensor; the message calls it ``what``."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{what} must be a tensor, got {type(tokens).__name__}; torch.as_tensor(…) makes one")


TokenKind = Literal["text", "image", "special"]


@dataclass(frozen=True)
class JointVocabulary:
    """One vocabulary of text, image and special ids, in this order, for models that read and write both.

    Attributes:
        text_size, image_size: number of text ids and of image ids; 1, a placeholder, if images are latents.
        specials: names of the special tokens; ``begin`` starts the user's turn, ``answer`` the model's.
    """

    text_size: int
    image_size: int
    specials: tuple[str, ...] = ("begin", "end", "begin_image", "end_image", "answer")

    def __post_init__(self) -> None:
        object.__setattr__(self, "specials", tuple(self.specials))

    @property
    def size(self) -> int:
        """Number of ids in all."""
        return self.text_size + self.image_size + len(self.specials)

    def span(self, kind: TokenKind) -> tuple[int, int]:
        """(start, stop) of the ids of a kind."""
        ends = {"text": self.text_size, "image": self.text_size + self.image_size, "special": self.size}
        starts = {"text": 0, "image": ends["text"], "special": ends["image"]}
        return starts[kind], ends[kind]

    def special(self, name: str) -> int:
        """The id of a special token. Raises ValueError for an unknown name."""
        if name not in self.specials:
            raise ValueError(f"{name!r} is no special token; there are {', '.join(self.specials)}")
        return self.span("special")[0] + self.specials.index(name)

    def joint(self, ids: Tensor, kind: TokenKind) -> Tensor:
        """Convert ids of a kind's own vocabulary to joint ids."""
        return ids + self.span(kind)[0]

    def own(self, ids: Tensor, kind: TokenKind) -> Tensor:
        """Convert joint ids of a kind to ids of its own vocabulary."""
        return ids - self.span(kind)[0]


@dataclass
class QuantizerOutput:
    """What a quantizer returns for latents (B, L, D).

    Attributes:
        quantized: (B, L, D), straight-through: the forward value is the code, the gradient goes to the latents.
        ids: (B, L), or (B, L, depth) of a residual quantizer.
        losses: unweighted terms by name, which objectives weight. "codebook" and "commitment" are per position, (B, L);
            terms that only exist for a batch ("entropy") are scalars.
        codebook_size: number of different ids.
    """

    quantized: Tensor
    ids: Tensor
    losses: dict[str, Tensor]
    codebook_size: int

    def usage(self) -> Tensor:
        """How often each code was chosen in this batch: (codebook_size,) counts."""
        return torch.bincount(self.ids.flatten(), minlength=self.codebook_size)


@dataclass(frozen=True)
class Clock:
    """The progress of a training run: ``step`` of ``max_steps`` optimisation steps are done."""

    step: int
    max_steps: int

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return self.step / self.max_steps


class DrawsInTraining(ABC):
    """A quantizer that is random in training; the caller makes its draws and passes them to ``forward``."""

    @abstractmethod
    def training_draws(self, keys: Keys, length: int) -> Draws:
        """The random tensors that ``forward`` consumes for latents (B, ``length``, D)."""


class AfterBackward(ABC):
    """A module that changes its own weights after the backward pass, such as a codebook that restarts dead codes."""

    @abstractmethod
    def after_backward(self) -> None:
        """Called by the training loop on every such module between the backward pass and the optimizer's step."""


MAIN = "main"
"""The name of the reconstruction that is shown to users."""


@dataclass(init=False)
class TokenizerOutput:
    """What a tokenizer's training forward returns.

    Attributes:
        reconstructions: pixels in [-1, 1] (not clamped) by name, in the shape of the target; the first is "main". Every
            pixel loss applies to each. A single tensor is the main one. None or an empty mapping is for decoders that
            are trained by their own loss only (flow decoders) and for tokenizers that render no pixels.
        tokens: (B, L[, depth]) ids or (B, L, D) latents.
        losses: the tokenizer's own unweighted terms (see QuantizerOutput.losses).
        features: named intermediate maps that losses may use, for example "latents" (B, L, D).
        weight_maps: the weight of each place in the losses of a reconstruction or a feature, by its name:
            (B, 1, H, W) or (B, 1, T, H, W) for pixels, (B, L) for features. Those without a map have uniform weights.

    Raises:
        ValueError: the first reconstruction is not "main", or a weight map names no reconstruction or feature.
    """

    reconstructions: dict[str, Tensor]
    tokens: Tensor
    losses: dict[str, Tensor]
    features: dict[str, Tensor]
    weight_maps: dict[str, Tensor]

    def __init__(
        self,
        reconstructions: Tensor | Mapping[str, Tensor] | None,
        tokens: Tensor,
        losses: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Tensor] | None = None,
        weight_maps: Mapping[str, Tensor] | None = None,
    ):
        if isinstance(reconstructions, Tensor):
            reconstructions = {MAIN: reconstructions}
        self.reconstructions, self.tokens = dict(reconstructions or {}), tokens
        self.losses, self.features, self.weight_maps = dict(losses or {}), dict(features or {}), dict(weight_maps or {})
        named = self.reconstructions
        if named and next(iter(named)) != MAIN:
            raise ValueError(f"the first reconstruction must be called {MAIN!r}, got {', '.join(named)}")
        unknown = self.weight_maps.keys() - named.keys() - self.features.keys()
        if unknown:
            raise ValueError(
                f"weight map of {sorted(unknown)[0]!r}, which is neither a reconstruction ({', '.join(named)}) nor a "
                f"feature ({', '.join(self.features)})"
            )

    @property
    def reconstruction(self) -> Tensor | None:
        """The main reconstruction, or None."""
        return self.reconstructions.get(MAIN)


@dataclass
class GeneratorOutput:
    """What a generator's training forward returns.

    Attributes:
        loss: scalar.
        prediction: logits (B, L, V) of a discrete model; velocities or noise of a continuous one.
        metrics: scalars to log, by name.
    """

    loss: Tensor
    prediction: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Expander(ABC):
    """Turns tokens into the inputs of the generator that continues them: a semantic feature per latent, or the map of
    the next scale. ``expand`` does it at once for training, ``step`` one by one for sampling, with equal results."""

    @abstractmethod
    def expand(self, tokens: Tensor) -> Tensor:
        """Inputs (B, L, E) for whole sequences of tokens (B, L[, D]); no input depends on a later token.

        If a step has several tokens, there are inputs for all steps except the first, which follows no token.
        """

    def correct(self, latents: Tensor, draws: Mapping[str, Tensor] | None, most: float) -> tuple[Tensor, Tensor]:
        """Bitwise self-correction: inputs and targets from latents (B, h * w, D), with random bits flipped.

        Args:
            draws: "flips" (B, L, D) and "strengths" (B, S); None flips no bits.
            most: the largest probability with which a bit is flipped.

        Returns:
            the inputs, as in ``expand``, and the ids (B, L) to predict.

        Raises:
            ValueError: the quantizer's ids are not bits.
        """
        raise ValueError(
            "these tokens are no bits: self-correction needs a tokenizer with the quantizer multi_scale_bsq"
        )

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Inputs (B, n, E) for the next tokens (B, n[, D]); tokens of earlier calls are remembered. If steps have
        several tokens, there are as many inputs as the step after has tokens."""


class Expands(Protocol):
    """A tokenizer that takes part in the training and the sampling of a generator."""

    def expander(self) -> Expander:
        """A new expander, which has seen no tokens."""

    @property
    def latent_statistics(self) -> Mapping[str, float] | None:
        """The mean and scale that latents are standardised with, by the names of the tokenizer's arguments; None if
        these are not single numbers for all channels."""


@dataclass(frozen=True)
class TokenChunk:
    """Tokens that a generator committed in one step; the chunks of a stream fill each position once.

    Attributes:
        positions: (B, n) int64, places of the tokens in the sequence.
        tokens: (B, n[, D]).
        valid: (B, n) bool, False where a row committed fewer tokens than others (speculative decoding).
        kind: the vocabulary of the tokens.
    """

    positions: Tensor
    tokens: Tensor
    valid: Tensor
    kind: TokenKind = "image"


T = TypeVar("T")
Sides = TypeVar("Sides", bound=tuple[int, ...])


def _sides(name: str, grid: object) -> tuple[int, ...]:
    if not isinstance(grid, list | tuple) or not grid or not all(type(side) is int and side >= 1 for side in grid):
        raise ValueError(f"{name} must be (height, width), whole numbers of at least 1; got {grid!r}")
    return tuple(grid)


def check_growth(scales: tuple[Sides, ...]) -> tuple[Sides, ...]:
    """Return the grids of scales if they are ordered from small to large; else raise ValueError."""
    for small, large in pairwise(scales):
        if len(small) != len(large) or any(one > other for one, other in zip(small, large)):
            raise ValueError(f"scales must be ordered from small to large, but {large} follows {small}")
    return scales


def as_dataclass(kind: type[T], value: T | Mapping[str, Any]) -> T:
    """``value`` if it is a ``kind`` already, else a ``kind`` built from the mapping (the form in saved configs).

    Raises:
        ValueError: ``value`` is neither.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in fields(cast(Any, kind)))
        raise ValueError(f"expected a {kind.__name__}, or its {{{names}}}, got {value!r}")
    return kind(**value)


def to_json(value: Any) -> Any:
    """``dataclasses.asdict`` for JSON: tuples become lists, dataclasses become dicts."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value
