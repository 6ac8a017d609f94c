"""The contract of every generator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.checkpoints import Model
from vistok.conditions import WORDS
from vistok.draws import Draws, Keys
from vistok.guidance import Guidance
from vistok.types import Clock, Condition, ConditionSpec, Expands, GeneratorOutput, TokenChunk, TokenSpec
from vistok.utils.processes import share_of_group


class Session(Protocol):
    """One sampling run with its cache: forced tokens can be appended and tokens generated, in turns."""

    @property
    def tokens(self) -> Tensor:
        """The tokens so far."""

    def append(self, tokens: Tensor) -> None:
        """Set the next positions to given tokens (B, n[, D]) instead of generating them."""

    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Generate the next ``num_tokens`` tokens (all that are left if None), chunk by chunk."""


class Conversation(Session, Protocol):
    """A session of a model that reads and writes texts and images in one context: user turns and replies."""

    def ask(self, condition: Condition) -> None:
        """Read another user turn, after the replies so far."""

    def wants_image(self) -> Tensor:
        """(B,) bool, True where the model would begin an image next, not a text."""

    def draw(self, options: Any, draws: Draws) -> Tensor:
        """Reply with an image: its tokens, sampled with ``options`` and the draws of ``sampling_draws``."""

    def write(self, max_tokens: int) -> Tensor:
        """Reply with a text: ids (B, n), padded with the generator's ``end``; n is at most ``max_tokens``."""

    def append_image(self, tokens: Tensor) -> None:
        """Append given image tokens as the model's reply."""

    def append_text(self, ids: Tensor) -> Tensor:
        """Append given ids (B, n) as the model's reply; return the logits (B, V) of the next id."""


class Generator(Model):
    """Models the tokens of a tokenizer, given a condition.

    The first constructor argument of every generator is ``spec``, the TokenSpec to model. A generator raises ValueError
    for a spec that it cannot model.
    """

    options_type: ClassVar[type]
    """The dataclass of sampling options that ``start`` takes."""

    spec: TokenSpec

    condition_dropout: float = 0.0
    """The share of training samples whose condition is dropped: those whose uniform number "drop" is below it."""

    only_next: ClassVar[str] = "it has a loss of its own"
    """Why the model cannot learn the objectives "next_all" and "random" (``vistok.train.tasks.prediction``); empty if
    it can."""

    plain_sequence: ClassVar[Mapping[str, Any]] = {}
    """Constructor arguments, other than the defaults, that tokens without an (h, w) raster need."""

    needs_tokenizer: ClassVar[bool] = False
    """Whether ``forward`` and ``start`` need the tokenizer, whose ``expander`` makes the inputs of the transformer."""

    reads_latents: bool = False
    """Whether it trains on the latents from which the ids are quantised, for bitwise self-correction."""

    takes_streams: bool = False
    """Whether ``forward`` also takes streams of texts and images (``Streams``) in place of tokens. On a class: whether
    some configurations do."""

    class_rows_from: int = 0
    """The row of the first class in the embedding table that holds the classes."""

    @property
    def has_null(self) -> bool:
        """Whether the model has a null condition, which unconditional generation and guidance need: condition dropout
        trains one, and a model without conditions has no other."""
        return self.condition_dropout > 0 or not self.condition_spec.parts

    @property
    def condition_spec(self) -> ConditionSpec:
        """What the model can be conditioned on: class labels by default."""
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
        context: Tensor | None = None,
    ) -> GeneratorOutput:
        """The training pass over tokens (B, L[, D]), teacher-forced where the model is autoregressive.

        Args:
            draws: from ``training_draws``; without "drop" among them, or None, no condition is dropped.
            weights: (B,) weight of each sample in the loss, for example 0 for samples without a caption.
            clock: the training progress, for parts with a schedule.
            tokenizer: the tokenizer of the tokens, if the model ``needs_tokenizer``.
            context: (B, *context_shape), fed in place of the tokens; the tokens stay the targets.
        """

    def drop_condition(self, condition: Condition, draws: Draws | None) -> Condition:
        """The condition, dropped in the rows whose "drop" is below ``condition_dropout``."""
        return condition.drop(draws["drop"] < self.condition_dropout) if draws and "drop" in draws else condition

    # The context: what training feeds in place of the tokens, with some replaced (``vistok.train.tasks.prediction``).

    @property
    def takes_context(self) -> bool:
        """Whether ``forward`` takes a context, and ``own_tokens`` makes one."""
        return "context" in signature(self.forward).parameters

    @property
    def context_shape(self) -> tuple[int, ...]:
        """The shape of a sample's context: (L,) of ids, (L, D) of latents."""
        return (self.spec.length,) if self.spec.discrete else (self.spec.length, self.spec.dim)

    def context_of(self, tokens: Tensor) -> Tensor:
        """The context (B, *context_shape) of tokens (B, L[, D]), in the form in which the transformer is fed them."""
        return tokens

    def replaced(self, uniforms: Tensor, share: float, draws: Draws) -> Tensor:
        """Which tokens of the context are replaced, about ``share`` of them: (B, N) bool.

        Args:
            uniforms: (B, N) in [0, 1), one per position of the context.
            draws: of ``training_draws``.
        """
        return uniforms < share

    def own_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``own_tokens`` consumes, for the batch of ``keys``; all names begin with "own"."""
        return {}

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Draw a context (B, *context_shape) of the model's own predictions in one training pass.

        Args:
            tokens: (B, L[, D]), which the model sees as in training.
            replaced: (B, N) bool, the positions of the context that the caller uses.
            draws: of ``training_draws`` and ``own_draws``.

        Raises:
            ValueError: this generator has none.
        """
        raise ValueError(f"{type(self).__name__} draws no tokens in training")

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
            tokenizer: as in ``forward``.
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
        on_step: Callable[[TokenChunk], None] | None = None,
    ) -> Tensor:
        """Generate whole sequences: tokens (B, L[, D]).

        Args:
            on_step: called with the tokens of each step.
        """
        session = self.start(condition, options, draws=draws, tokenizer=tokenizer)
        for chunk in session.generate():
            if on_step is not None:
                on_step(chunk)
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
        """Regenerate the positions of tokens (B, L[, D]) where ``regenerate``, (L,) or (B, L) bool, is True.

        Raises:
            ValueError: this generator does not support editing.
        """
        self.check_edits()
        raise NotImplementedError

    def check_edits(self) -> None:
        """Raise ValueError if this generator has no ``edit`` of its own."""
        if type(self).edit is Generator.edit:
            raise ValueError(
                f"{type(self).__name__} cannot keep some tokens and generate the others; editing needs a generator of "
                "discrete ids, or one that fills in any positions"
            )

    def edited_positions(self, tokens: Tensor, regenerate: Tensor) -> Tensor:
        """``regenerate``, (L,) or (B, L), as (B, L) bool for whole sequences of tokens (B, L[, D]).

        Raises:
            ValueError: tokens of another tokenizer, or another shape or type of ``regenerate``.
        """
        (self.spec.check_ids if self.spec.discrete else self.spec.check_latents)(tokens)
        rows, length = tokens.shape[:2]
        if length != self.spec.length or regenerate.shape not in ((length,), (rows, length)):
            whole = f"(B, {self.spec.length})" if self.spec.discrete else f"(B, {self.spec.length}, D)"
            raise ValueError(
                f"tokens must be {whole} and regenerate ({self.spec.length},) or (B, {self.spec.length}), got "
                f"{tuple(tokens.shape)} and {tuple(regenerate.shape)}"
            )
        if regenerate.dtype != torch.bool:
            raise ValueError(f"regenerate must be bool, True where tokens are generated; got {regenerate.dtype}")
        return regenerate.expand(rows, -1)

    end: int | None = None
    """The id that ends a text; None if the model writes no texts."""

    def check_writes(self) -> None:
        """Raise ValueError if this generator writes no texts."""
        if self.end is None:
            raise ValueError(
                f"{type(self).__name__} writes images alone, given {self.condition_spec.describe()}; captions and "
                "conversations need a model that writes texts, too"
            )

    def converse(self, rows: int = 1, options: Any = None, *, tokenizer: Expands | None) -> Conversation:
        """An empty context for a batch of ``rows`` conversations.

        Raises:
            ValueError: this generator writes no texts.
        """
        self.check_writes()
        raise NotImplementedError

    def describe(self, condition: Condition, max_tokens: int, *, tokenizer: Expands | None) -> Tensor:
        """Answer in text: ids (B, n), n <= max_tokens, padded with ``end``.

        Args:
            condition: an image (``given``), a question (``ids``), or both.

        Raises:
            ValueError: this generator writes no texts, or reads no images.
        """
        self.check_writes()
        raise NotImplementedError

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
        """Sample, but take the tokens (B, L[, D]) where ``forced`` (B, L) is True: partly teacher-forced generation,
        used by the post-training of tokenizers (RobusTok, arXiv 2509.12474).

        A next-token generator sees a forced token only in the steps after it. Others see all forced tokens from the
        beginning, as in ``edit``.

        Raises:
            ValueError: this generator does not support forced tokens.
        """
        self.check_edits()
        return self.edit(tokens, ~forced, condition, options, draws=draws, tokenizer=tokenizer)

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Sample with compiled steps from now on.

        Raises:
            ValueError: this generator has none.
        """
        raise ValueError(f"{type(self).__name__} has no compiled decoding; generators of one token after another have")

    def needed_tokenizer(self, tokenizer: Expands | None) -> Expands:
        """Return the tokenizer of a model that needs it. Raises ValueError if it is absent or the model needs none."""
        self.check_tokenizer(tokenizer)
        if tokenizer is None:
            raise ValueError(f"{type(self).__name__} reads tokens as they are")
        return tokenizer

    def check_tokenizer(self, tokenizer: Expands | None) -> None:
        """Raise ValueError if the model needs a tokenizer and has none, or has one that it does not need."""
        if self.needs_tokenizer and tokenizer is None:
            raise ValueError(f"{type(self).__name__} reads what its tokenizer makes of the tokens: pass tokenizer=…")
        if tokenizer is not None and not self.needs_tokenizer:
            raise ValueError(f"{type(self).__name__} reads tokens as they are; leave tokenizer= out")

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        """The constructor's arguments that follow from the conditions of the data.

        Raises:
            ValueError: this generator cannot be conditioned on them; the message says why.
        """
        cls.refuse_parts(spec, "labels")
        return {"num_classes": spec.num_classes}

    @classmethod
    def tokenizer_arguments(cls, tokenizer: Expands) -> dict[str, Any]:
        """The constructor's arguments that follow from the tokenizer, for generators with the tokenizer in the loop."""
        return {}

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

    def class_rows(self, condition: Condition) -> Tensor:
        """(R,) int64: the row of each sample's class in the embedding table. Dropped samples get the null class, whose
        row follows the last class."""
        null = torch.full_like(condition.dropped, self.class_rows_from + (self.num_classes or 0), dtype=torch.int64)
        labels = condition.labels
        return null if labels is None else torch.where(condition.dropped, null, self.class_rows_from + labels)

    def check_condition(self, condition: Condition) -> None:
        """Raise ValueError if the condition does not match the spec, or has dropped rows without a null condition."""
        self.condition_spec.check(condition)
        if not self.has_null and bool(condition.dropped.any()):
            self.check_null()

    def check_null(self) -> None:
        """Raise ValueError unless the model has a null condition."""
        if not self.has_null:
            raise ValueError(
                "this generator was built without a null condition (condition_dropout 0): it cannot generate "
                "unconditionally or with guidance, which is off at scale 1, and every sample needs "
                f"{self.condition_spec.describe()}"
            )

    def check_start(self, condition: Condition, guidance: Guidance, tokenizer: Expands | None) -> None:
        """Raise ValueError unless sampling can start: the tokenizer and the conditions of all rows of ``guidance`` must
        fit the model."""
        self.check_tokenizer(tokenizer)
        self.check_condition(condition)
        if guidance.is_on:
            self.check_condition(guidance.conditions(condition))


def check_single_ids(spec: TokenSpec, model: str) -> TokenSpec:
    """Return the spec if its tokens are one id per position; else raise ValueError. ``model`` is for messages."""
    if not spec.discrete:
        raise ValueError(f"{model} predicts discrete ids; this tokenizer has continuous latents of {spec.dim} channels")
    if spec.depth != 1:
        raise ValueError(f"{model} predicts one id per position; this tokenizer has {spec.depth} (residual codes)")
    return spec


def check_draws(draws: Draws | None, rows: int, *temperatures: float, names: Sequence[str] = ()) -> None:
    """Raise ValueError unless the draws fit a batch.

    Args:
        rows: samples of the batch. An "order" is left to ``check_orders``.
        temperatures: draws may be absent if all of them are 0.
        names: draws that are needed at a temperature above 0.
    """
    is_random = any(temperature > 0 for temperature in temperatures)
    if draws is None and is_random:
        raise ValueError(
            "sampling with a temperature above 0 needs draws: pass sampling_draws(Keys.range(seed, B), options)"
        )
    lacking = [name for name in names if is_random and name not in (draws or {})]
    if lacking:
        raise ValueError(f"there are no draws {lacking[0]!r}: pass sampling_draws(Keys.range(seed, B), options)")
    for name, values in (draws or {}).items():
        if name != "order" and len(values) != rows:
            raise ValueError(
                f"the draws {name!r} are of {len(values)} samples, but there are {rows}: make them with as many keys"
            )


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of values (B,) with weights (B,); 0 if all weights are 0, since a batch may hold no usable sample. In
    distributed training, this process's part of the mean over all processes; see ``share_of_group``."""
    if weights is None:
        return values.mean()
    total = share_of_group(weights.sum())
    return (values * weights).sum() / total.where(total > 0, 1)


def token_loss(logits: Tensor, ids: Tensor, weights: Tensor | None) -> GeneratorOutput:
    """Cross entropy of logits (B, L, V) to ids (B, L) in nats per token, (weighted) mean over samples; metric
    "accuracy", the share of correct ids."""
    per_sample = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)
    accuracy = (logits.detach().argmax(-1) == ids).float().mean()
    return GeneratorOutput(weighted_mean(per_sample, weights), logits, {"accuracy": accuracy})
