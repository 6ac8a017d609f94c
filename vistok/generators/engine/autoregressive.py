"""The decoding engine of discrete autoregressive transformers.

A model defines how conditions and ids are embedded and how entries are transformed. Teacher forcing, the training loss
and cached sampling are implemented here for all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vistok.draws import Draws, Keys
from vistok.generators.base import Generator, check_draws, check_single_ids, token_loss
from vistok.generators.engine.cache import CachedLayers, KVCache
from vistok.generators.engine.compiled import CompiledStep
from vistok.generators.engine.decodings import DECODINGS
from vistok.generators.engine.packed import DecodingCopies
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, inverse_cdf_ids, part_draws
from vistok.generators.engine.session import AutoregressiveSession
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.rotary import Positions
from vistok.types import Clock, Condition, Expands, GeneratorOutput


class OrderedEntries(NamedTuple):
    """The entries of a training pass, condition and tokens, and which of them predict the tokens.

    Attributes:
        x: (B, e, D), the embedded entries.
        positions: of the entries, for ``transform``.
        order: (1 or B, L), the places of the tokens in the order in which they are predicted.
        tokens: the slice of the entries that are tokens: all tokens but the last, in order.
        states: the slice of the entries whose hidden states predict the tokens, in order.
    """

    x: Tensor
    positions: Positions
    order: Tensor
    tokens: slice
    states: slice


class AutoregressiveGenerator(Generator):
    """A causal transformer over [condition tokens, image tokens].

    A subclass sets ``spec``, ``condition_length`` (tokens T that the condition takes), ``condition_dropout`` (the
    probability of training a sample without its condition), ``blocks`` with an ``attn`` each, ``norm`` and ``output``,
    and defines the three methods below. ``num_classes`` is None for models that take no labels.
    """

    options_type = DecodingOptions
    only_next = ""
    condition_length: int
    num_classes: int | None
    blocks: ModuleList[Any]
    norm: nn.Module
    output: nn.Module
    num_parts: int = 1  # how many parts an id is drawn in, one after another
    shift_dim: int = 0  # width of the token shift's memory in the cache; 0 without one
    compiled_step: CompiledStep | None = None

    def __init__(self) -> None:
        super().__init__()
        self.decoding_copies = DecodingCopies()

    def train(self, mode: bool = True) -> Self:
        if mode:  # training changes the weights, and needs the memory
            self.decoding_copies.clear()
        return super().train(mode)

    @abstractmethod
    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        """(R, T, D) embeddings of the condition; dropped rows get the null embedding.

        Args:
            upcoming: (1 or R, n) int64, the places of the tokens that are predicted first.
        """

    @abstractmethod
    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """The entries (R, e, D) of tokens, one per token by default.

        Args:
            ids: (R, n), of one step or of several one-token steps. A model that ``needs_tokenizer`` gets the outputs of
                the tokenizer's expander instead.
            places: (1 or R, n) int64, the places of the tokens in the image.
            upcoming: the places that are predicted next: (1 or R, n), one after each token, in one-token steps; else
                (1 or R, m), all places of the next step.
        """

    @abstractmethod
    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        """Hidden states (R, e, D) of entries x (R, e, D), the inputs of ``head``.

        Args:
            positions: of the entries in the sequence, which begins with the condition.
            mask: bool, broadcastable to (R, H, e, keys); None is plain causal attention.
            kv_cache: the cache of each layer; None without a cache.
            *state: the output of ``condition_state``.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return self.output(self.norm(hidden)).float()

    def step_logits(self, hidden: Tensor, count: int) -> Tensor:
        """Float32 logits (R, count, V) of the tokens of the next step, from the hidden states (R, e, D) of all entries
        before it. By default the last ``count`` entries give one token each."""
        return self.entry_logits(hidden[:, -count:])

    def entry_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (R, e, V) of the token after each entry, from the hidden states (R, e, D), for models whose
        steps have one token."""
        return self.head(hidden)

    def part_logits(self, hidden: Tensor, count: int, parts: Sequence[Tensor]) -> Tensor:
        """Float32 logits (R, count, V_p) of one part of the ids of the next step, for models that draw an id in several
        parts. ``step_logits`` gives the logits of the first part.

        Args:
            hidden: as in ``step_logits``.
            parts: (R, count) each, the preceding parts of the ids.
        """
        raise ValueError(f"{type(self).__name__} draws whole ids, which have no parts")

    def split_ids(self, ids: Tensor) -> Sequence[Tensor]:
        """The parts (...) of ids (...), in the order in which they are drawn."""
        return (ids,)

    def join_ids(self, parts: Sequence[Tensor]) -> Tensor:
        """The ids (...) from all their parts (...); the inverse of ``split_ids``."""
        (ids,) = parts
        return ids

    def plan(self, draws: Draws) -> Plan:
        """The steps of a sample: by default one token after another in raster order.

        Args:
            draws: of ``sampling_draws``; empty if sampling is deterministic.
        """
        return Plan.raster(self.spec.length)

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        """Tensors (R, ...) that are computed once from the condition and passed to every ``transform``, such as the
        class vector of adaptive norms."""
        return ()

    @property
    def num_entries(self) -> int:
        """The number of entries of a whole sequence, condition and tokens."""
        return self.condition_length + self.spec.length

    def new_cache(self, rows: int, length: int, device: torch.device | str | None = None) -> KVCache:
        """An empty cache of ``length`` entries, by default on the device of the weights.

        It has the dtype of the weights, except that half precision becomes float32 on a CPU, where a single query
        attends to float32 keys in half the time.
        """
        attention = self.blocks[0].attn
        weight = attention.qkv.weight
        is_half_on_cpu = weight.is_cpu and weight.dtype in (torch.bfloat16, torch.float16)
        return KVCache(
            len(self.blocks),
            rows,
            attention.num_kv_heads,
            length,
            attention.head_dim,
            shift_dim=self.shift_dim,
            dtype=torch.float32 if is_half_on_cpu else weight.dtype,
            device=device or weight.device,
        )

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Sample with compiled steps of fixed shapes from now on; on a CUDA device, a token is one graph launch.

        Each new batch size and set of options is compiled at its first use. ``backend`` is torch.compile's.
        """
        self.compiled_step = CompiledStep(type(self.blocks[0]), backend)

    def cache_bytes(self, batch: int, *, guided: bool) -> int:
        """Bytes of the cache for sampling ``batch`` images; guidance with a null row doubles them."""
        return self.new_cache(batch * (1 + guided), self.num_entries, "meta").nbytes

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """The attention mask of the entries [start, stop) over the first ``stop`` entries: bool
        (R or 1, 1, stop - start, stop); None is plain causal attention."""
        return None

    check_spec = staticmethod(check_single_ids)

    def logits(self, ids: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced logits (B, L, V): position i, seeing the condition and ids[:, :i], predicts ids[:, i]."""
        x = self.embed_sequence(ids[:, :-1], condition)
        length = x.shape[1]
        mask, state = self.attention_mask(condition, 0, length), self.condition_state(condition)
        hidden = self.transform(x, slice(0, length), mask, None, *state)
        return self.head(hidden[:, self.condition_length - 1 :])

    def embed_sequence(self, ids: Tensor, condition: Condition) -> Tensor:
        """The entries (B, T + n, D) of a condition and of the first n ids (B, n) in raster order."""
        places = torch.arange(ids.shape[1] + 1, device=ids.device)[None]
        tokens = self.embed_tokens(ids, places[:, :-1], places[:, 1:])
        return torch.cat([self.embed_condition(condition, places[:, :1]), tokens], 1)

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
        """Cross entropy in nats per token, (weighted) mean over samples; metric "accuracy": share of correct ids."""
        self.check_tokenizer(tokenizer)
        condition = self.drop_condition(condition, draws)
        logits = self.logits(tokens if context is None else context, condition)
        return token_loss(logits, tokens, weights)

    def training_draws(self, keys: Keys) -> Draws:
        return {"drop": keys.uniform("drop")}

    def training_logits(self, tokens: Tensor, condition: Condition, draws: Draws, tokenizer: Expands | None) -> Tensor:
        """Logits (B, L, V) of the training pass in raster order."""
        return self.logits(tokens, condition)

    def own_draws(self, keys: Keys) -> Draws:
        """ "own" (B, L, P) uniform, one number for each of the P parts of an id."""
        return {"own": keys.uniform("objective own", self.spec.length, self.num_parts)}

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        logits = self.training_logits(tokens, self.drop_condition(condition, draws), draws, tokenizer)
        return inverse_cdf_ids(logits, draws["own"][..., 0])

    def ordered_entries(self, ids: Tensor, condition: Condition, draws: Draws) -> OrderedEntries:
        """The entries of a training pass over ids (B, L), in the order in which they are predicted."""
        x, first = self.embed_sequence(ids[:, :-1], condition), self.condition_length
        order = torch.arange(ids.shape[1], device=ids.device)[None]
        return OrderedEntries(x, slice(0, x.shape[1]), order, slice(first, None), slice(first - 1, None))

    def target_logits(self, hidden: Tensor, ids: Tensor) -> list[Tensor]:
        """Logits (B, n, V_p) of each part of ids (B, n), from the hidden states (B, n, D) that predict the ids."""
        return [self.head(hidden)]

    def sampling_draws(self, keys: Keys, options: DecodingOptions | None = None) -> Draws:
        options = options or self.options_type()
        draws = DECODINGS[options.decoding].draws(keys, self.spec.length, options)
        return draws | {name: keys.uniform(name, self.spec.length) for name in part_draws(self.num_parts)[1:]}

    def start(
        self,
        condition: Condition,
        options: DecodingOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> AutoregressiveSession:
        options = options or self.options_type()
        self.check_start(condition, options.guidance, tokenizer)
        check_draws(draws, len(condition), *(options.of_part(part).temperature for part in range(self.num_parts)))
        copies, compiled = self.decoding_copies, self.compiled_step
        expander = None if tokenizer is None else tokenizer.expander()
        session = self.session_type(options)
        return session(self, condition, options, draws, copies=copies, compiled_step=compiled, expander=expander)

    @torch.no_grad()
    def sample_forced(
        self,
        tokens: Tensor,
        forced: Tensor,
        condition: Condition,
        options: DecodingOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        session = self.start(condition, options, draws=draws, tokenizer=tokenizer)
        session.force(tokens, forced)
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
        """Regenerate some positions and keep the others: inpainting, if tokens have a place in the image.

        Tokens are still generated step by step. A known token is forced at its own step, so a generated token sees only
        the known tokens of earlier steps: in raster order, those above and to the left. **Tokens to the right and below
        are ignored**, and generated tokens may not fit them. Generators that fill in any positions (MaskGIT, RandAR,
        LPD, MAR) see all kept tokens. Tokens of one step are independent of each other: in a partly known window or
        scale, the rest is generated without seeing its known tokens.

        Args:
            tokens: (B, L) ids of the images.
            regenerate: (L,) or (B, L) bool, True where tokens are generated.
            condition: of the edited images.
            options: any decoding; ``jacobi`` and ``cautious`` keep known tokens, too.
            draws: of ``sampling_draws``.
            tokenizer: as in ``forward``.

        Returns:
            (B, L) ids, on the device of ``tokens``.

        Raises:
            ValueError: ids of another tokenizer, another shape of ``regenerate``, or as ``start``.
        """
        regenerate = self.edited_positions(tokens, regenerate)
        made = self.sample_forced(tokens, ~regenerate, condition, options, draws=draws, tokenizer=tokenizer)
        return made.to(tokens.device)

    def session_type(self, options: DecodingOptions) -> type[AutoregressiveSession]:
        """The class of the sessions for these options."""
        return AutoregressiveSession
