"""The decoding engine of discrete generators that predict one token after another with a transformer.

A model says how conditions and ids are embedded and how positions are transformed; teacher forcing, the training loss
and cached sampling follow from that, here and once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vistok.draws import Draws, Keys
from vistok.generators.base import Generator, check_draws, token_loss
from vistok.generators.engine.cache import CachedLayers, KVCache
from vistok.generators.engine.compiled import CompiledStep
from vistok.generators.engine.decodings import DECODINGS
from vistok.generators.engine.packed import DecodingCopies
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, drawn_ids, part_draws
from vistok.generators.engine.session import AutoregressiveSession
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.rotary import Positions
from vistok.types import Clock, Condition, Expands, GeneratorOutput, TokenSpec


class OrderedEntries(NamedTuple):
    """The entries of a training pass, condition and tokens, of which every token has a state that predicts it.

    Attributes:
        x: (B, e, D).
        positions: of the entries, for ``transform``.
        order: (1 or B, L), the places of the tokens in the order in which they are predicted.
        tokens: which entries are the tokens, all but the last, in order.
        states: which entries' hidden states predict the tokens, in order.
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
        """(R, T, D) embeddings of the condition, null embeddings in its dropped rows.

        Args:
            upcoming: (1 or R, n) int64, the places of the tokens that are predicted first.
        """

    @abstractmethod
    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """The entries (R, e, D) that the transformer is fed of tokens, one for each unless the model says otherwise.

        Args:
            ids: (R, n), of one step, or of several steps of one token each; where the model ``needs_tokenizer``, what
                its expander makes of them.
            places: (1 or R, n) int64, where in the image they lie.
            upcoming: the places that are predicted from them: (1 or R, n), of one after each, where steps have one
                token; else (1 or R, m), of all tokens of the next step.
        """

    @abstractmethod
    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        """Logits' inputs: hidden states (R, e, D) of entries (R, e, D).

        Args:
            positions: of the entries in the sequence, which begins with the condition.
            mask: bool, broadcastable to (R, H, e, keys); replaces plain causal attention where it is given.
            kv_cache: of each layer.
            *state: what ``condition_state`` gave.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return self.output(self.norm(hidden)).float()

    def step_logits(self, hidden: Tensor, count: int) -> Tensor:
        """Float32 logits (R, count, V) of the tokens of the next step, from the hidden states (R, e, D) of all entries
        before it. By default the last ``count`` entries give one token each."""
        return self.entry_logits(hidden[:, -count:])

    def entry_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (R, e, V) of the token after each of the entries, from their hidden states (R, e, D), where
        steps have one token."""
        return self.head(hidden)

    def part_logits(self, hidden: Tensor, count: int, parts: Sequence[Tensor]) -> Tensor:
        """Float32 logits (R, count, V_p) of one part of the ids of the next step. For models that draw an id in several
        parts; ``step_logits`` gives the first.

        Args:
            hidden: as in ``step_logits``.
            parts: (R, count) each, the parts that come before it.
        """
        raise ValueError(f"{type(self).__name__} draws whole ids, which have no parts")

    def split_ids(self, ids: Tensor) -> Sequence[Tensor]:
        """The parts (...) of ids (...), in the order in which they are drawn."""
        return (ids,)

    def join_ids(self, parts: Sequence[Tensor]) -> Tensor:
        """The ids (...) of all their parts (...)."""
        (ids,) = parts
        return ids

    def plan(self, draws: Draws) -> Plan:
        """The steps of a sample: one token after another in raster order, unless the model says otherwise.

        Args:
            draws: of ``sampling_draws``; empty where sampling is deterministic.
        """
        return Plan.raster(self.spec.length)

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        """Tensors (R, ...) that are computed from the condition once and handed to every ``transform``, such as the
        class vector of adaptive norms."""
        return ()

    @property
    def num_entries(self) -> int:
        """How many entries a whole sequence has, condition and tokens."""
        return self.condition_length + self.spec.length

    def new_cache(self, rows: int, length: int, device: torch.device | str | None = None) -> KVCache:
        """An empty cache of ``length`` entries, where the weights are if no device is named.

        It has the type of the weights, but float32 on a CPU: a single query attends there in half the time that it
        takes over keys in half precision.
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
        """From now on sample with compiled steps of fixed shapes, on a CUDA device as one graph launch per token.

        The first images take longer, once for each batch size and each set of options. ``backend`` is torch.compile's.
        """
        self.compiled_step = CompiledStep(type(self.blocks[0]), backend)

    def cache_bytes(self, batch: int, *, guided: bool) -> int:
        """Bytes of cache that sampling ``batch`` images will take; a null row doubles them."""
        return self.new_cache(batch * (1 + guided), self.num_entries, "meta").nbytes

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """What the entries [start, stop) see of the first ``stop``: bool (R or 1, 1, stop - start, stop), or
        None where plain causal attention is meant."""
        return None

    @staticmethod
    def check_spec(spec: TokenSpec, model: str) -> TokenSpec:
        """Return a spec that a plain next-token model can handle; ValueError otherwise."""
        if not spec.discrete:
            raise ValueError(
                f"{model} predicts discrete ids; this tokenizer has continuous latents of {spec.dim} channels"
            )
        if spec.depth != 1:
            raise ValueError(f"{model} predicts one id per position; this tokenizer has {spec.depth} (residual codes)")
        return spec

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
        """Cross entropy in nats per token, (weighted) mean over samples; metric: "accuracy", share of ids right."""
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
        """ "own" (B, L, P) uniform, for each part of an id."""
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
        return drawn_ids(logits, draws["own"][..., 0])

    def ordered_entries(self, ids: Tensor, condition: Condition, draws: Draws) -> OrderedEntries:
        """The entries of a training pass over ids (B, L), in the order in which they are predicted."""
        x, first = self.embed_sequence(ids[:, :-1], condition), self.condition_length
        order = torch.arange(ids.shape[1], device=ids.device)[None]
        return OrderedEntries(x, slice(0, x.shape[1]), order, slice(first, None), slice(first - 1, None))

    def target_logits(self, hidden: Tensor, ids: Tensor) -> list[Tensor]:
        """Logits (B, n, V_p) of each part of ids (B, n), from the hidden states (B, n, D) that they are predicted
        from."""
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
        check_draws(draws, *(options.of_part(part).temperature for part in range(self.num_parts)))
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
        """Generate some positions anew and keep the others: inpainting, where tokens have a place.

        Tokens are still generated one step after another. A known token is forced when its turn comes, so what is drawn
        sees the known tokens of earlier steps alone: in a raster those above and to the left. **Tokens to the right and
        below are not looked at**, and what is drawn need not meet them well; generators that fill in any positions
        (MaskGIT, RandAR, LPD, MAR) see all that is kept. Tokens of one step are independent of each other: in a window
        or a scale that is partly known, the rest is drawn without a look at what is known of it.

        Args:
            tokens: (B, L) ids of the images.
            regenerate: (L,) or (B, L) bool, True where tokens are generated.
            condition: of what is generated.
            options: any decoding; ``jacobi`` and ``cautious`` keep known tokens, too.
            draws: of ``sampling_draws``.
            tokenizer: as in ``forward``.

        Returns:
            (B, L) ids, where ``tokens`` are.

        Raises:
            ValueError: ids of another tokenizer, another shape of ``regenerate``, or as ``start``.
        """
        regenerate = self.edited_positions(tokens, regenerate)
        made = self.sample_forced(tokens, ~regenerate, condition, options, draws=draws, tokenizer=tokenizer)
        return made.to(tokens.device)

    def session_type(self, options: DecodingOptions) -> type[AutoregressiveSession]:
        """The sessions that sample with these options."""
        return AutoregressiveSession
