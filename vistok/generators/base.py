"""The contract of every generator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vistok.checkpoints import Model
from vistok.conditions import WORDS
from vistok.draws import Draws, Keys
from vistok.types import Clock, Condition, ConditionSpec, Expands, GeneratorOutput, TokenChunk, TokenSpec


class Session(Protocol):
    """One sampling run with its cache: forced tokens can be appended and tokens generated, in turns."""

    tokens: Tensor

    def append(self, tokens: Tensor) -> None:
        """Put given tokens (B, n[, D]) at the next positions, instead of generating them."""

    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Generate the next ``num_tokens`` tokens (all that are left if None), chunk by chunk."""


class Generator(Model):
    """Models the tokens of a tokenizer, given a condition.

    The first constructor argument of every generator is ``spec``, the TokenSpec it models; a generator refuses, with a
    ValueError, one that it cannot.
    """

    options_type: ClassVar[type]
    """The dataclass of sampling options that ``start`` takes."""

    spec: TokenSpec

    plain_sequence: ClassVar[Mapping[str, Any]] = {}
    """Arguments with which it takes tokens that lie on no (h, w) raster, where it needs others than its defaults."""

    needs_tokenizer: ClassVar[bool] = False
    """Whether ``forward`` and ``start`` need the tokenizer, whose ``expander`` makes the inputs of the transformer."""

    num_classes: int | None = None
    """Number of classes that it can be conditioned on; None if it takes no labels."""

    has_null: bool = True
    """Whether rows without a condition can be generated, and so guidance be used."""

    @property
    def condition_spec(self) -> ConditionSpec:
        """What it can be conditioned on: class labels, unless the generator says otherwise."""
        return ConditionSpec(num_classes=self.num_classes or 0)

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        clock: Clock | None = None,
        tokenizer: Expands | None = None,
    ) -> GeneratorOutput:
        """The training pass over tokens (B, L[, D]), teacher-forced where the model is autoregressive.

        Args:
            draws: from ``training_draws``; without "drop" among them, or None, no condition is dropped.
            weights: (B,) weight of each sample in the loss, for example 0 for samples without a caption.
            clock: where training stands, for parts with a schedule.
            tokenizer: the tokenizer of the tokens, where the model ``needs_tokenizer``.
        """

    @abstractmethod
    def training_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``forward`` consumes, for the batch of ``keys``."""

    @abstractmethod
    def sampling_draws(self, keys: Keys, options: Any = None) -> Draws:
        """The random tensors that sampling with ``options`` (an ``options_type``, None for its defaults) consumes, for
        the batch of ``keys``."""

    @abstractmethod
    def start(
        self,
        condition: Condition,
        options: Any = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Session:
        """Begin a sampling session for the rows of ``condition``.

        Args:
            options: an ``options_type``; None takes its defaults.
            draws: from ``sampling_draws``; needed unless the options make sampling deterministic.
            tokenizer: as of ``forward``.
        """

    def stream(
        self,
        condition: Condition,
        options: Any = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Iterator[TokenChunk]:
        """Generate whole sequences chunk by chunk."""
        return self.start(condition, options, draws=draws, tokenizer=tokenizer).generate()

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        options: Any = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Generate whole sequences: tokens (B, L[, D])."""
        session = self.start(condition, options, draws=draws, tokenizer=tokenizer)
        for _ in session.generate():
            pass
        return session.tokens

    def edit(
        self,
        tokens: Tensor,
        regenerate: Tensor,
        condition: Condition,
        options: Any = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Generate some positions of tokens (B, L[, D]) anew, those where ``regenerate`` (B, L) is True. Generators
        that need no tokenizer may leave that argument out.

        Raises:
            ValueError: this generator cannot, because it has an order of its own.
        """
        raise ValueError(
            f"{type(self).__name__} generates in an order of its own and cannot keep tokens that come later; editing "
            "needs a generator that fills in any positions"
        )

    def sample_forced(
        self,
        tokens: Tensor,
        forced: Tensor,
        condition: Condition,
        options: Any = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Sample, but take the tokens (B, L[, D]) where ``forced`` (B, L) is True: partly teacher-forced generation, as
        the post-training of tokenizers wants it (RobusTok, arXiv 2509.12474).

        A generator of one step after another meets a forced token when its turn comes; others see them from the
        beginning, as in ``edit``.

        Raises:
            ValueError: this generator can take no tokens of which some come later.
        """
        in_loop = {} if tokenizer is None else {"tokenizer": tokenizer}
        return self.edit(tokens, ~forced, condition, options, draws=draws, **in_loop)

    def compile_decoding(self, backend: str = "inductor") -> None:
        """From now on sample with compiled steps.

        Raises:
            ValueError: this generator has none.
        """
        raise ValueError(f"{type(self).__name__} has no compiled decoding; generators of one token after another have")

    def check_tokenizer(self, tokenizer: Expands | None) -> None:
        """Raise ValueError if a tokenizer is absent although the model needs it, or given although it does not."""
        if self.needs_tokenizer and tokenizer is None:
            raise ValueError(f"{type(self).__name__} reads what its tokenizer makes of the tokens: pass tokenizer=…")
        if tokenizer is not None and not self.needs_tokenizer:
            raise ValueError(f"{type(self).__name__} reads tokens as they are; leave tokenizer= out")

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        """The constructor's arguments that follow from what the data are conditioned on.

        Raises:
            ValueError: this generator cannot be conditioned on that; the message says why.
        """
        cls.refuse_parts(spec, "labels")
        return {"num_classes": spec.num_classes}

    @classmethod
    def refuse_parts(cls, spec: ConditionSpec, *taken: str) -> None:
        """Raise ValueError for data with other parts than those named."""
        others = spec.only([part for part in spec.parts if part not in taken])
        if others.parts:
            allowed = " or ".join(WORDS[part] for part in taken)
            raise ValueError(
                f"{cls.registry_name} takes {allowed}, and these data have {others.describe()}: name what it is to be "
                f"conditioned on with condition=[…], of {', '.join(spec.parts)}, or choose another generator"
            )

    def check_condition(self, condition: Condition) -> None:
        """Raise ValueError for a condition that is not of the spec, or for unconditional rows without a null class."""
        self.condition_spec.check(condition)
        if not self.has_null and bool(condition.dropped.any()):
            raise ValueError(
                "this generator was built without a null class (condition_dropout 0): it cannot generate "
                f"unconditionally or with guidance, and every sample needs {self.condition_spec.describe()}"
            )


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (B,) with weights (B,), 0 where all weights are 0: a batch may hold no usable sample."""
    total = weights.sum()
    return (values * weights).sum() / total.where(total > 0, 1)
