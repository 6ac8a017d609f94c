"""The decoding engine of discrete generators that predict one token after another with a transformer.

A model says how conditions and ids are embedded and how positions are transformed; teacher forcing, the training loss
and cached sampling follow from that, here and once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws, Keys
from vistok.generators.base import Generator, weighted_mean
from vistok.generators.engine.cache import KVCache, Layers
from vistok.generators.engine.compiled import CompiledStep, SessionSteps
from vistok.generators.engine.packed import DecodingCopies, DecodingCopy
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.guidance import PLAIN
from vistok.nn.rotary import Rows
from vistok.types import Clock, Condition, Expands, GeneratorOutput, TokenChunk, TokenSpec


class AutoregressiveGenerator(Generator):
    """A causal transformer over [condition tokens, image tokens].

    A subclass sets ``spec``, ``condition_length`` (tokens T that the condition takes), ``condition_dropout`` (the
    probability of training a sample without its condition), ``blocks`` with an ``attn`` each, ``norm`` and ``output``,
    and defines the three methods below. ``num_classes`` is None for models that take no labels.
    """

    options_type = DecodingOptions
    condition_length: int
    condition_dropout: float
    num_classes: int | None
    blocks: nn.ModuleList
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
    def embed_condition(self, condition: Condition) -> Tensor:
        """(R, T, D) embeddings of the condition, null embeddings in its dropped rows."""

    @abstractmethod
    def embed_tokens(self, ids: Tensor, where: Rows) -> Tensor:
        """(R, n, D) embeddings of ids (R, n) that lie at the image positions ``where``."""

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        """What follows from the condition once, such as the class vector of adaptive norms, with the rows R as first
        axis: further arguments of every ``transform``."""
        return ()

    @abstractmethod
    def transform(self, x: Tensor, where: Rows, mask: Tensor | None, layers: Layers | None, *state: Tensor) -> Tensor:
        """Logits' inputs: hidden states (R, n, D) of embeddings (R, n, D) at the sequence positions ``where``.

        ``mask`` (broadcastable to (R, H, n, keys), bool) replaces plain causal attention where it is given; ``layers``
        is the cache of each layer; ``state`` is ``condition_state``.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return self.output(self.norm(hidden)).float()

    def new_cache(self, rows: int, length: int, device: torch.device | str | None = None) -> KVCache:
        """An empty cache of ``length`` sequence positions, where the weights are if no device is named."""
        attention, weight = self.blocks[0].attn, self.output.weight
        return KVCache(
            len(self.blocks),
            rows,
            attention.num_kv_heads,
            length,
            attention.head_dim,
            shift_dim=self.shift_dim,
            dtype=weight.dtype,
            device=device or weight.device,
        )

    def compile_decoding(self, backend: str = "inductor") -> None:
        """From now on sample with compiled steps of fixed shapes, on a CUDA device as one graph launch per token.

        The first images take longer, once for each batch size and each set of options. ``backend`` is torch.compile's.
        """
        self.compiled_step = CompiledStep(type(self.blocks[0]), backend)

    def cache_bytes(self, batch: int, *, guided: bool) -> int:
        """Bytes of cache that sampling ``batch`` images will take; a null row doubles them."""
        rows, length = batch * (1 + guided), self.condition_length + self.spec.length
        return self.new_cache(rows, length, "meta").nbytes

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """What the sequence positions [start, stop) see of the first ``stop``: bool (R or 1, 1, stop - start, stop), or
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
        ids = ids[:, :-1]
        x = torch.cat([self.embed_condition(condition), self.embed_tokens(ids, slice(0, ids.shape[1]))], 1)
        length = x.shape[1]
        hidden = self.transform(x, slice(0, length), self.attention_mask(condition, 0, length), None)
        return self.head(hidden[:, self.condition_length - 1 :])

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
        """Cross entropy in nats per token, (weighted) mean over samples; metric: "accuracy", share of ids right."""
        self.check_tokenizer(tokenizer)
        if draws and "drop" in draws:
            condition = condition.drop(draws["drop"] < self.condition_dropout)
        logits = self.logits(tokens, condition)
        per_sample = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1)
        loss = per_sample.mean() if weights is None else weighted_mean(per_sample, weights)
        accuracy = (logits.detach().argmax(-1) == tokens).float().mean()
        return GeneratorOutput(loss, logits, {"accuracy": accuracy})

    def training_draws(self, keys: Keys) -> Draws:
        return {"drop": keys.uniform("drop")}

    def sampling_draws(self, keys: Keys, options: DecodingOptions | None = None) -> Draws:
        return {"ids": keys.uniform("ids", self.spec.length)}

    def start(
        self,
        condition: Condition,
        options: DecodingOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> AutoregressiveSession:
        self.check_tokenizer(tokenizer)
        options = options or DecodingOptions()
        self.check_condition(condition)
        guidance = options.guidance
        if guidance.is_on:
            self.check_condition(guidance.conditions(condition))
        if draws is None and options.temperature > 0:
            raise ValueError(
                "sampling with a temperature above 0 needs draws: pass sampling_draws(Keys.range(seed, B))"
            )
        return AutoregressiveSession(self, condition, options, draws)


class AutoregressiveSession:
    """Cached sampling for one batch of conditions; all rows of guidance ride in the same batch of the model.

    Attributes:
        tokens: (B, count) ids so far.
    """

    # Tensors that outlive a step are made here, outside of inference mode, so that callers may train on the tokens.
    @torch.no_grad()
    def __init__(
        self, model: AutoregressiveGenerator, condition: Condition, options: DecodingOptions, draws: Draws | None
    ):
        device = next(model.parameters()).device
        condition = condition.to(device)
        batch, length = len(condition), model.spec.length
        self.model, self.options = model, options
        self.guidance = options.guidance
        self.rows = self.guidance.conditions(condition)
        self._state = model.condition_state(self.rows)
        self._weights = [self.guidance.weights(position, length) for position in range(length)]
        self._combine = self.guidance.start()
        self.cache = model.new_cache(len(self.rows), model.condition_length + length)
        self.uniforms = None if draws is None else draws["ids"].to(device)
        self._tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self._positions = torch.arange(length, device=device).expand(batch, length)
        self._valid = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.count = 0
        self._copy = self._decoding_copy()
        self._logits = self._advance(model.embed_condition(self.rows))
        self._steps = self._compiled_steps()

    @property
    def tokens(self) -> Tensor:
        return self._tokens[:, : self.count]

    def append(self, tokens: Tensor) -> None:
        """Force ids (B, n) at the next positions (a prefix, a region taken from another image).

        Raises:
            ValueError: ids out of range, another batch size, or more of them than positions left.
        """
        ids = self.model.spec.check_ids(tokens).to(self._tokens.device)
        if len(ids) != len(self._tokens):
            raise ValueError(f"the session has {len(self._tokens)} rows, the tokens {len(ids)}")
        stop = self.count + ids.shape[1]
        if stop > self._tokens.shape[1]:
            raise ValueError(
                f"{self.count} tokens are set and {ids.shape[1]} more exceed the {self._tokens.shape[1]} there are"
            )
        self._tokens[:, self.count : stop] = ids
        self.count = stop

    @torch.inference_mode()
    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Generate the next ids, one chunk of (B, 1) per position."""
        left = self._tokens.shape[1] - self.count
        if num_tokens is not None and num_tokens > left:
            raise ValueError(f"num_tokens {num_tokens} exceeds the {left} positions left")
        for position in range(self.count, self.count + (left if num_tokens is None else num_tokens)):
            if self._steps is not None and self._unseen == 1:
                self._steps(position)
                self.cache.advance(1)
            else:
                self._tokens[:, position] = self._draw(position)
            self.count = position + 1
            here = slice(position, position + 1)
            yield TokenChunk(self._positions[:, here], self._tokens[:, here], self._valid)

    @property
    def _unseen(self) -> int:
        """Tokens at the end that the cache has not seen."""
        return self.model.condition_length + self.count - self.cache.length

    def _draw(self, position: int) -> Tensor:
        """Ids (B,) of the next position."""
        logits = self._combine(self._next_logits(), self._weights[position])
        uniforms = None if self.uniforms is None else self.uniforms[:, position]
        return draw_ids(logits, uniforms, self.options)

    def _next_logits(self) -> Tensor:
        """Logits (R, V) of the next position, after feeding the tokens that the cache has not seen."""
        fed = self.count - self._unseen
        if fed < self.count:
            ids = self.guidance.repeat(self._tokens[:, fed : self.count])
            self._logits = self._advance(self.model.embed_tokens(ids, slice(fed, self.count)))
        return self._logits

    @torch.inference_mode()
    def _advance(self, x: Tensor) -> Tensor:
        """Logits (R, V) that follow the embeddings x (R, n, D) of the next n positions."""
        if not self._copy.has_todays_weights():  # between two chunks of a stream its caller may train the model
            self._copy = self._decoding_copy()
        model = self._copy.model
        start, stop = self.cache.length, self.cache.length + x.shape[1]
        hidden = model.transform(x, slice(start, stop), self._mask(start, stop), self.cache.layers, *self._state)
        return model.head(hidden[:, -1])

    def _decoding_copy(self) -> DecodingCopy:
        rows = 1 if self.model.compiled_step else len(self.rows)  # compilers choose products themselves
        return self.model.decoding_copies.of(self.model, rows)

    def _mask(self, start: int, stop: int) -> Tensor | None:
        """What sequence positions [start, stop) see of the first ``stop``; None where it is all, or plainly causal."""
        mask = self.model.attention_mask(self.rows, start, stop)
        if mask is not None or start == 0 or stop - start == 1:
            return mask
        return torch.ones(stop - start, stop, dtype=torch.bool, device=self._tokens.device).tril(start)

    def _compiled_steps(self) -> SessionSteps | None:
        """Steps of one token, where the model was told to compile them and rows are combined without a memory."""
        if self.model.compiled_step is None or self.guidance.combination != PLAIN:
            return None
        last = self.model.condition_length + self.model.spec.length
        return SessionSteps(
            self.model.compiled_step,
            self.model,
            self.options,
            tokens=self._tokens,
            uniforms=self.uniforms,
            weights=torch.tensor(self._weights, device=self._tokens.device),
            visible=self.model.attention_mask(self.rows, last - 1, last),
            cache=self.cache,
            state=self._state,
        )
