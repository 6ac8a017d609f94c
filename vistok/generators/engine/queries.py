"""Generators that predict each token from a position query, in any order and several at once.

A step feeds the tokens of the step before and its own queries. Once the tokens of a step are known, they replace its
queries in the cache.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vistok.draws import Draws, Keys
from vistok.generators.base import check_draws
from vistok.generators.engine.orders import OrderedGenerator
from vistok.generators.engine.plan import Plan, check_orders
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.engine.session import AutoregressiveSession
from vistok.guidance import Guidance, Weights
from vistok.types import Condition, Expands


def cosine_groups(num_steps: int, length: int) -> tuple[int, ...]:
    """How many of ``length`` tokens each step generates: one at first, then ever more (arXiv 2412.01827).

    The first step generates one token. After step s = 1, 2, ... (from 0) there are
    min(int((1 - cos(pi/2 (s + 1) / num_steps)) length + 1), length) tokens, at least one more than before. With
    num_steps 1 there are two steps, because the first has one token.

    Raises:
        ValueError: fewer than one step, or more steps than tokens.
    """
    if steps_of(num_steps, length) == length:
        return (1,) * length
    sizes, done = [1], 1
    while done < length:
        share = 1 - math.cos(math.pi / 2 * min((len(sizes) + 1) / num_steps, 1.0))
        target = min(int(share * length + 1), length)
        sizes.append(max(target - done, 1))
        done += sizes[-1]
    return tuple(sizes)


def steps_of(num_steps: int, length: int) -> int:
    """Return ``num_steps`` if it lies in 1 .. length; else raise ValueError."""
    if not 1 <= num_steps <= length:
        raise ValueError(f"num_steps must lie in 1..{length}, one for each token at most; got {num_steps}")
    return num_steps


@dataclass(frozen=True)
class QueryOptions(DecodingOptions):
    """How ids are drawn, and how many in each step.

    Attributes:
        num_steps: number of forward passes; None is the model's default. With L steps, each generates one token.
        group_sizes: the number of tokens of each step, instead of ``num_steps``; their sum is the number of tokens.

    The others are those of ``DecodingOptions``. Guidance schedules count tokens: step i of n is token i of n.

    Raises:
        ValueError: num_steps and group_sizes together, num_steps that is no integer, or sizes below 1.
    """

    num_steps: int | None = None
    group_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None and not isinstance(self.num_steps, Integral):
            raise ValueError(f"num_steps must be a whole number, got {self.num_steps}")
        if self.group_sizes is None:
            return
        if self.num_steps is not None:
            raise ValueError("group_sizes say how many steps there are; leave num_steps out")
        object.__setattr__(self, "group_sizes", tuple(self.group_sizes))
        if not self.group_sizes or not all(isinstance(size, Integral) and size >= 1 for size in self.group_sizes):
            raise ValueError(f"group_sizes must be numbers of tokens from 1 on, got {self.group_sizes}")


class QuerySession(AutoregressiveSession):
    """Cached sampling in groups: the cache keeps the known tokens and ``kept_queries`` queries of each step."""

    model: QueryGenerator
    options: QueryOptions

    def _plan(self) -> Plan:
        return self.model.steps(self.draws, self.options)

    def _weights_of(self, guidance: Guidance) -> list[Weights]:
        return self.model.guidance_weights(guidance, self.plan)

    def _compiled_steps(self) -> None:
        return None

    def _begin(self) -> tuple[Tensor, Tensor]:
        upcoming = self._for_rows(self.plan.places(0))
        return self._run(self.model.embed_condition(self.rows, upcoming), None, upcoming)

    def _catch_up(self) -> tuple[Tensor, Tensor]:
        first, bounds = self.seen, self.plan.bounds
        known, upcoming = (self._for_rows(self.plan.places(step)) for step in (first, first + 1))
        ids = self.guidance.repeat(self.sequence[:, bounds[first] : bounds[first + 1]])
        self.kv_cache.truncate(self.kv_cache.length - (ids.shape[1] - self.model.kept_queries))
        self.seen = first + 1
        return self._run(self.model.embed_tokens(ids, known, upcoming), known, upcoming)

    @torch.inference_mode()
    def _run(self, x: Tensor, known: Tensor | None, upcoming: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (R, e, D), and logits (R, n, V) of the places ``upcoming``, whose queries come last in x."""
        model, cache, count = self.network(), self.kv_cache, upcoming.shape[1]
        mask = self.model.step_mask(x.shape[1] - count, count, cache.length, x.device)
        hidden = model.transform(x, self.model.entry_positions(known, upcoming), mask, cache.layers, *self.state)
        return hidden, model.step_logits(hidden, count)


class QueryGenerator(OrderedGenerator):
    """A transformer over [condition, tokens, queries].

    ``embed_condition`` gives the condition's entries and the queries of the first step, ``embed_tokens`` the entries of
    one step's tokens and the queries of the next. A subclass also defines the abstract methods below.
    """

    only_next = "it predicts a group of tokens at once, each from a query of its own"
    options_type = QueryOptions
    condition_length = 1
    kept_queries: int
    """How many queries of each step stay in the cache."""

    @property
    @abstractmethod
    def default_steps(self) -> int:
        """The number of steps of a sample if the options name none."""

    @abstractmethod
    def entry_positions(self, known: Tensor | None, upcoming: Tensor) -> Tensor | slice:
        """The ``positions`` that ``transform`` gets for the entries of a step.

        Args:
            known: (1 or R, m), places of the tokens that are fed; None for the condition.
            upcoming: (1 or R, n), places of the queries.
        """

    @abstractmethod
    def step_mask(self, known: int, queries: int, start: int, device: torch.device) -> Tensor | None:
        """The attention mask of a step, bool (known + queries, start + known + queries), True where attention is
        allowed; None is plain causal attention, for a step with an empty cache.

        Args:
            known, queries: the numbers of tokens and of queries; queries come last.
            start: entries that the cache holds already.
        """

    def group_sizes(self, options: QueryOptions) -> tuple[int, ...]:
        """How many tokens each step generates.

        Raises:
            ValueError: group sizes that do not sum to the number of tokens, or more steps than tokens.
        """
        length = self.spec.length
        if options.group_sizes is None:
            return self.scheduled_groups(self._num_steps(options))
        if sum(options.group_sizes) != length:
            raise ValueError(
                f"group_sizes {options.group_sizes} sum to {sum(options.group_sizes)}, not to {length} tokens"
            )
        return options.group_sizes

    def _num_steps(self, options: QueryOptions) -> int:
        """The number of steps of a whole image."""
        num_steps = self.default_steps if options.num_steps is None else options.num_steps
        return steps_of(num_steps, self.spec.length)

    def scheduled_groups(self, num_steps: int) -> tuple[int, ...]:
        """The group sizes for ``num_steps`` steps, by default those of ``cosine_groups``."""
        return cosine_groups(num_steps, self.spec.length)

    def steps(self, draws: Draws, options: QueryOptions) -> Plan:
        """The plan of a sample: groups of the drawn order, or of raster order if none was drawn.

        Raises:
            ValueError: an order that is no permutation of the places, or group sizes that do not fit.
        """
        length = self.spec.length
        order = check_orders(draws["order"], length) if "order" in draws else torch.arange(length)[None]
        return Plan(order, self.group_sizes(options))

    def guidance_weights(self, guidance: Guidance, plan: Plan) -> list[Weights]:
        """The weights of the guidance rows in each step; the schedule is evaluated at the first token of the group."""
        length = self.spec.length
        return [guidance.weights(plan.bounds[step], length) for step in range(len(plan))]

    def session_type(self, options: DecodingOptions) -> type[QuerySession]:
        """Always ``QuerySession``."""
        return QuerySession

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Raises ValueError: steps of several tokens have no compiled form."""
        raise ValueError(f"{type(self).__name__} has no compiled decoding: its steps generate several tokens")

    def edit(
        self,
        tokens: Tensor,
        regenerate: Tensor,
        condition: Condition,
        options: QueryOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Regenerate some positions and keep the others: inpainting, if tokens have a place in the image.

        Kept tokens come first in the order, so every generated token sees all of them.

        Args:
            tokens: (B, L) ids of the images.
            regenerate: (L,) or (B, L) bool, True where tokens are generated.
            condition: the class of the edited images.
            options: ``num_steps`` is for whole images; an edit takes its share of it, rounded up.
            draws: of ``sampling_draws``.

        Returns:
            (B, L) ids.

        Raises:
            ValueError: ids of another tokenizer, another shape of ``regenerate``, group sizes, or no draws.
        """
        self.check_tokenizer(tokenizer)
        kept = ~self.edited_positions(tokens, regenerate)
        options, length = options or self.options_type(), self.spec.length
        if options.group_sizes is not None:
            raise ValueError("an edit generates as many tokens as it is asked for; give num_steps, not group_sizes")
        check_draws(draws, len(condition), options.temperature)
        edited = tokens.clone()
        for count in kept.sum(1).unique().tolist():  # images with equally many kept tokens have the same steps
            rows = (kept.sum(1) == count).nonzero()[:, 0]
            part = {name: value[rows.to(value.device)] for name, value in (draws or {}).items()}
            if count < length:
                edited[rows] = self._edit(tokens[rows], kept[rows], count, condition[rows], options, part)
        return edited

    def _edit(
        self, ids: Tensor, kept: Tensor, count: int, condition: Condition, options: QueryOptions, draws: Draws
    ) -> Tensor:
        """``edit`` for rows that all keep ``count`` tokens: ids (B, L)."""
        length = self.spec.length
        order = draws.get("order", torch.arange(length).expand(ids.shape)).to(ids.device)
        order = order.gather(1, kept.gather(1, order).long().argsort(dim=1, descending=True, stable=True))
        num_steps, left = self._num_steps(options), length - count
        sizes = cosine_groups(math.ceil(num_steps * left / length), left)
        options = replace(options, num_steps=None, group_sizes=(count, *sizes) if count else sizes)
        session = self.start(condition, options, draws=draws | {"order": order})
        session.append(ids.gather(1, order)[:, :count])
        for _ in session.generate():
            pass
        return session.tokens.to(ids.device)

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; "order" (B, L), a random order of each sample."""
        return {"drop": keys.uniform("drop"), "order": keys.permutation("order", self.spec.length)}

    def sampling_draws(self, keys: Keys, options: Any = None) -> Draws:
        """ "ids" (B, L), a uniform number for each token; "order" (B, L), a random order of each sample."""
        return super().sampling_draws(keys, options) | {"order": keys.permutation("order", self.spec.length)}
