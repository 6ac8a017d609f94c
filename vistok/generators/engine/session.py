"""One sampling run of a discrete autoregressive model: its tokens, its KV cache, and its next logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.generators.engine.compiled import CompiledStep, SessionSteps, SessionTensors
from vistok.generators.engine.contracts import NextTokenModel
from vistok.generators.engine.decodings import DECODINGS
from vistok.generators.engine.packed import DecodingCopies, DecodingCopy
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.engine.windows import Windows, only_forced
from vistok.guidance import PLAIN, Guidance, Weights
from vistok.types import Condition, Expander, TokenChunk
from vistok.utils.finite import explain


class AutoregressiveSession:
    """Cached sampling for one batch of conditions; the model's batch holds all rows of guidance.

    Attributes:
        plan: the steps.
        step: the number of finished steps.
        rows: the conditions of all rows of guidance.
        kv_cache: the condition, and the tokens of the first ``seen`` steps.
        draws: random tensors of the decoding, on the device; empty if sampling is deterministic.
        sequence: (B, L) ids in the order of generation, 0 where none is set yet.
        weights: of the rows of guidance at each step, for the first part of an id.
        forced: ids (B, L) in the order of generation, and a bool mask (B, L) of the forced ones; None if none is.
        seen: the number of steps whose tokens were fed.
        failed: (1,), the first token whose logits were not finite; L if all were finite.
        expander: makes the model's inputs from tokens, for models with the tokenizer in the loop; else None.
    """

    # Tensors that outlive a step are made here, outside of inference mode, so that callers may train on the tokens.
    @torch.no_grad()
    def __init__(
        self,
        model: NextTokenModel,
        condition: Condition,
        options: DecodingOptions,
        draws: Draws | None,
        *,
        copies: DecodingCopies,
        compiled_step: CompiledStep | None = None,
        expander: Expander | None = None,
    ):
        device = model.device
        condition = condition.to(device)
        self.model, self.options, self._copies, self._compiled_step = model, options, copies, compiled_step
        self.expander = expander
        self.draws = {name: value.to(device) for name, value in (draws or {}).items()}
        self.plan = self._plan().to(device)
        if len(self.plan.order) not in (1, len(condition)):
            raise ValueError(
                f"{len(self.plan.order)} orders do not fit {len(condition)} rows: one for each, or one for all"
            )
        self.decoding = DECODINGS[options.decoding]
        self.num_parts = model.num_parts
        self.decoding.check(self.plan, options, self.num_parts)
        self.guidance = options.guidance
        self.rows = self.guidance.conditions(condition)
        self.state = model.condition_state(self.rows)
        self.kv_cache = model.new_cache(len(self.rows), model.num_entries)
        self.kv_cache.visible = model.attention_mask(self.rows, model.num_entries - 1, model.num_entries)
        self.step = 0
        self._part_weights = [self._weights_of(options.of_part(part).guidance) for part in range(self.num_parts)]
        self._combines = [self.guidance.start() for _ in range(self.num_parts)]
        self.weights, self.combine = self._part_weights[0], self._combines[0]
        length = self.plan.order.shape[1]
        self.sequence = torch.zeros(len(condition), length, dtype=torch.int64, device=device)
        self._order = self.plan.order.expand(len(condition), length)
        self._valid = torch.ones(len(condition), length, dtype=torch.bool, device=device)
        self.forced: tuple[Tensor, Tensor] | None = None
        self.failed = torch.full((1,), length, device=device)
        self._copy = self._decoding_copy()
        self.seen = 0
        self._hidden, self._logits = self._begin()
        self._compiled = self._compiled_steps()

    def _weights_of(self, guidance: Guidance) -> list[Weights]:
        """The weights of the session's rows at each step; rows that ``guidance`` lacks weigh 0."""
        lacking = (0.0,) * (len(self.guidance.rows) - len(guidance.rows))
        return [guidance.weights(step, len(self.plan)) + lacking for step in range(len(self.plan))]

    # -----------------------------------------------------------------------------------------------------------------
    # What callers see

    @property
    def count(self) -> int:
        """The number of tokens that are set."""
        return self.plan.bounds[self.step]

    @property
    def tokens(self) -> Tensor:
        """The ids so far: (B, count) in raster order; for other orders (B, L) by place, 0 where none is set yet."""
        if self.plan.is_raster:
            return self.sequence[:, : self.count]
        here = slice(0, self.count)
        return torch.zeros_like(self.sequence).scatter(1, self._order[:, here], self.sequence[:, here])

    def append(self, tokens: Tensor) -> None:
        """Force ids (B, n) at the next positions (a prefix, a region taken from another image).

        Raises:
            ValueError: ids out of range, another batch size, more of them than positions left, or not whole steps.
        """
        ids = self.model.spec.check_ids(tokens).to(self.sequence.device)
        if len(ids) != len(self.sequence):
            raise ValueError(f"the session has {len(self.sequence)} rows, the tokens {len(ids)}")
        stop = self.count + ids.shape[1]
        if stop > self.sequence.shape[1]:
            raise ValueError(
                f"{self.count} tokens are set and {ids.shape[1]} more exceed the {self.sequence.shape[1]} there are"
            )
        step = self._step_at(stop)
        self.sequence[:, self.count : stop] = ids
        self.step = step

    def force(self, ids: Tensor, where: Tensor) -> None:
        """Take the given ids (B, L) where ``where`` (B, L) is True, and draw the others; both are in raster order.
        Tokens that are generated before a given one do not see it.

        Raises:
            ValueError: ids out of range, or other shapes.
        """
        for values in (ids, where):
            if values.shape != self.sequence.shape:
                raise ValueError(f"ids and mask must be {tuple(self.sequence.shape)}, got {tuple(values.shape)}")
        ids = self.model.spec.check_ids(ids)
        device = self._order.device
        self.forced = ids.to(device).gather(1, self._order), where.to(device).gather(1, self._order)

    @torch.inference_mode()
    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Generate the next ids, one chunk per step.

        Raises:
            ValueError: more tokens than positions left, not whole steps, or, at the end, logits that were not finite.
        """
        left = self.sequence.shape[1] - self.count
        if num_tokens is not None and num_tokens > left:
            raise ValueError(f"num_tokens {num_tokens} exceeds the {left} positions left")
        stop = self._step_at(self.count + (left if num_tokens is None else num_tokens))
        yield from self.decoding.run(self, stop)
        self._check_finite()

    def _step_at(self, count: int) -> int:
        step = self.plan.step_at(count)
        if step is None:
            sizes = ", ".join(map(str, self.plan.sizes[self.step :][:8]))
            raise ValueError(f"{count} tokens end within a step; the next steps have {sizes} tokens")
        return step

    # -----------------------------------------------------------------------------------------------------------------
    # What decodings use

    def next_logits(self, parts: Sequence[Tensor] = ()) -> Tensor:
        """Guided logits (B, n, V) of the tokens of the next step. With the first ``parts`` (B, n) of their ids, the
        logits of the part that follows these."""
        while self.seen < self.step:
            self._hidden, self._logits = self._catch_up()
        if not parts:
            return self._guided(self._logits, self.weights[self.step], self.count)
        given = [self.guidance.repeat(part) for part in parts]
        logits = self.network().part_logits(self._hidden, self.plan.sizes[self.step], given)
        return self._guided(logits, self._part_weights[len(parts)][self.step], self.count, len(parts))

    def commit(self, parts: Sequence[Tensor]) -> TokenChunk:
        """Set the ids of the next step, given by their parts (B, n)."""
        here = slice(self.plan.bounds[self.step], self.plan.bounds[self.step + 1])
        self.sequence[:, here] = self.model.join_ids(parts)
        return self._done(here)

    def _done(self, here: slice) -> TokenChunk:
        self.step += 1
        return TokenChunk(self._order[:, here], self.sequence[:, here], self._valid[:, here])

    def run_compiled(self) -> TokenChunk | None:
        """Run the next step compiled; None if there is no compiled step for it."""
        if self._compiled is None or self.forced is not None or self.step - self.seen != 1:
            return None
        self._compiled(self.step)
        self.kv_cache.advance(1)
        self.seen += 1
        return self._done(slice(self.count, self.count + 1))

    @property
    def vocabulary_size(self) -> int:
        """The number of ids."""
        return self.model.spec.num_ids

    @property
    def grid_width(self) -> int | None:
        """The number of tokens in a row of the image; None if they have no raster."""
        grid = self.model.spec.grid
        return None if grid is None else grid[-1]

    def open_window(self, size: int) -> Windows:
        """Passes of ``size`` entries per row, each row at a place of its own. Exactly one token must be unfed."""
        return Windows(self, size)

    def choose(self, rows: Tensor) -> None:
        """Keep these samples (n,), in this order; one may be listed more than once (branches, trials).

        Raises:
            ValueError: guidance that remembers earlier steps of each sample.
        """
        if self.guidance.combination != PLAIN:
            raise ValueError("samples cannot branch under guidance that remembers earlier steps; take plain guidance")
        count = len(self.sequence)
        every = torch.cat([rows + number * count for number in range(len(self.guidance.rows))])
        with torch.inference_mode(False), torch.no_grad():  # callers may train on the tokens
            self.sequence, self._order, self._valid = (t[rows] for t in (self.sequence, self._order, self._valid))
            self.draws = {name: values[rows] for name, values in self.draws.items()}
            self.forced = None if self.forced is None else (self.forced[0][rows], self.forced[1][rows])
            self._hidden, self._logits = self._hidden[every], self._logits[every]
            self.rows, self.state = self.rows[every], tuple(values[every] for values in self.state)
            self.kv_cache.choose(every)
        self._copy, self._compiled = self._decoding_copy(), None

    # -----------------------------------------------------------------------------------------------------------------
    # Passes through the model

    def _plan(self) -> Plan:
        return self.model.plan(self.draws)

    def _begin(self) -> tuple[Tensor, Tensor]:
        """Hidden states of the condition, and logits of the first step's tokens."""
        return self._advance(self.model.embed_condition(self.rows, self._for_rows(self.plan.places(0))))

    def _catch_up(self) -> tuple[Tensor, Tensor]:
        """Feed tokens that the cache lacks; return their hidden states and the logits of the step after them."""
        return self._advance(self._embed_unseen())

    def _embed_unseen(self) -> Tensor:
        """Embeddings of tokens that the cache lacks: all of them if steps have one token, else those of one step."""
        first, bounds = self.seen, self.plan.bounds
        last = self.step if self.plan.is_single else first + 1
        here = slice(bounds[first], bounds[last])
        upcoming = self.plan.order[:, here.start + 1 : here.stop + 1] if self.plan.is_single else self.plan.places(last)
        self.seen = last
        places = self._for_rows(self.plan.order[:, here]), self._for_rows(upcoming)
        return self.model.embed_tokens(self.guidance.repeat(self._inputs(here)), *places)

    def _inputs(self, here: slice) -> Tensor:
        """The model's inputs for tokens that are set: their ids (B, n), or the expander's outputs."""
        return self._expanded(self.sequence[:, here])

    def _expanded(self, tokens: Tensor) -> Tensor:
        """The expander's inputs (B, m, E) for the next tokens, in the model's dtype; the tokens if there is none."""
        if self.expander is None:
            return tokens
        return self.expander.step(tokens).to(self.sequence.device).to(self.kv_cache.dtype)

    def _for_rows(self, places: Tensor) -> Tensor:
        """Places (1 or B, n) for all rows of guidance, (1 or R, n)."""
        return places if len(places) == 1 else self.guidance.repeat(places)

    @torch.inference_mode()
    def _advance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (R, e, D) of the embeddings x (R, e, D), and logits (R, n, V) of the n tokens of the step that
        follows them."""
        model, cache = self.network(), self.kv_cache
        start, stop = cache.length, cache.length + x.shape[1]
        hidden = model.transform(x, slice(start, stop), self._mask(start, stop), cache.layers, *self.state)
        return hidden, model.step_logits(hidden, self.plan.sizes[self.seen])

    def _mask(self, start: int, stop: int) -> Tensor | None:
        """The attention mask of the entries [start, stop) over the first ``stop``; None if full or plain causal."""
        if start and stop - start == 1 and self.kv_cache.visible is not None:  # known: nothing is computed in each step
            return self.kv_cache.visible[..., :stop]
        mask = self.model.attention_mask(self.rows, start, stop)
        if mask is not None or start == 0 or stop - start == 1:
            return mask
        return torch.ones(stop - start, stop, dtype=torch.bool, device=self.sequence.device).tril(start)

    def _guided(self, logits: Tensor, weights: Weights, first: int, part: int = 0) -> Tensor:
        """Guided logits (B, n, V) of one part of the tokens from number ``first`` on, from the logits (R, n, V) of all
        rows."""
        logits = self._combines[part](logits, weights)
        self.failed.copy_(torch.where(logits.sum().isfinite(), self.failed, self.failed.clamp_max(first)))
        if self.forced is None:
            return logits
        ids, where = (values[:, first : first + logits.shape[1]] for values in self.forced)
        return only_forced(logits, self.model.split_ids(ids)[part], where)

    def _check_finite(self) -> None:
        """Raise ValueError if logits were not finite. Reads ``failed``, the only synchronisation with the device."""
        failed = int(self.failed)
        if failed < self.sequence.shape[1]:
            raise ValueError(explain(f"the logits of token {failed}", self.model.dtype))

    def network(self) -> NextTokenModel:
        """The model, or the packed copy of it for decoding steps."""
        if not self._copy.has_todays_weights():  # the caller may train the model between two chunks of a stream
            self._copy = self._decoding_copy()
        return self._copy.model

    def _decoding_copy(self) -> DecodingCopy:
        rows = 1 if self._compiled_step else len(self.rows)  # nothing is packed for 1: compilers choose the kernels
        return self._copies.of(cast(nn.Module, self.model), rows)

    def _compiled_steps(self) -> SessionSteps | None:
        """The compiled steps if the model compiles its decoding, steps have one token in raster order, and guidance is
        plain; else None."""
        simple = self.plan.is_raster and self.plan.is_single and self.guidance.combination == PLAIN
        if self._compiled_step is None or not simple:
            return None
        weights = torch.tensor(self.weights, device=self.sequence.device)
        tensors = SessionTensors(
            self.sequence, self.draws.get("ids"), weights, self.failed, self.state, cache=self.kv_cache
        )
        return SessionSteps(self._compiled_step, self.model, self.options, tensors)
