"""Training objectives of generators: what is predicted, and from which context.

TokenUnify (Chen et al., arXiv 2405.16847) trains one network to predict the next token, all later tokens, and masked
tokens. Here the tokens are ids, and one of these predictions is drawn for each batch. Scheduled sampling (Bengio et
al., arXiv 1506.03099) replaces a share of the context with tokens that the model itself draws, in one extra pass for
all of them, as Mihaylova & Martins do for transformers (arXiv 1906.07651). Most generators can be trained with such a
context; a mixture of predictions needs one that predicts ids one after another. Sampling does not change, because only
the model is exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws, Keys
from vistok.generators.base import Generator
from vistok.generators.engine.autoregressive import AutoregressiveGenerator, OrderedEntries
from vistok.signatures import ConfigError, check_least
from vistok.types import Clock, Condition, Expands, GeneratorOutput

Prediction = Literal["next", "next_all", "random"]
Share = float | tuple[float, float]
NAMES: tuple[Prediction, ...] = ("next", "next_all", "random")


@dataclass(frozen=True)
class ScheduledSampling:
    """Scheduled sampling: the model itself draws a share of the context tokens.

    Attributes:
        share: the share from ``end`` on.
        start, end: progress of the run, 0 to 1, between which the share rises linearly from 0.
    """

    share: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start and end are shares of the run, 0 <= start < end <= 1, got {self.start} and {self.end}"
            )

    def at(self, progress: float) -> float:
        return self.share * min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class PredictionConfig:
    """The ``objective`` section of a generator's config.

    Attributes:
        next, next_all, random: how often each prediction (the next token, later tokens, masked tokens) is drawn for a
            batch; they add up to 1. Two numbers are the shares at the beginning and at the end of the run, between
            which they change linearly.
        next_all_targets: how many of the later tokens each position predicts, drawn anew; 0 is all of them.
        masked: share of the tokens that ``random`` masks.
        scheduled_sampling: for the context of ``next`` and ``next_all``; None feeds only the data.
        token_noise: share of that context that is replaced with random ids; with normal noise for latents, which are
            standardised.

    The context depends on the model: the tokens before, those of all scales before, whole entities (xAR), or the tokens
    that are not masked (MAR, MaskGIT), of which only these are replaced.
    """

    next: Share = 1.0
    next_all: Share = 0.0
    random: Share = 0.0
    next_all_targets: int = 4
    masked: float = 0.5
    scheduled_sampling: ScheduledSampling | None = None
    token_noise: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, next_all_targets=0)
        for end, when in ((0, "beginning"), (1, "end")):
            shares = {name: _at(getattr(self, name), float(end)) for name in NAMES}
            if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
                told = ", ".join(f"{name} {share:g}" for name, share in shares.items())
                raise ValueError(
                    f"the shares of next, next_all and random must be 0 or more and add up to 1; at the {when} they "
                    f"are {told}, {sum(shares.values()):g} in all"
                )
        if not 0 < self.masked <= 1:
            raise ValueError(f"masked must lie in (0, 1], the share of tokens that are left out; got {self.masked}")
        if not 0 <= self.token_noise < 1:
            raise ValueError(f"token_noise must lie in [0, 1), a share of the context; got {self.token_noise}")

    @property
    def is_plain(self) -> bool:
        """Whether this is the generator's own objective."""
        return self == PredictionConfig(next_all_targets=self.next_all_targets, masked=self.masked)

    @property
    def mixed(self) -> list[Prediction]:
        """The predictions in use other than ``next``."""
        return [name for name in NAMES[1:] if self.uses(name)]

    def uses(self, name: Prediction) -> bool:
        return any(_at(getattr(self, name), end) > 0 for end in (0.0, 1.0))

    def shares(self, progress: float) -> list[float]:
        return [_at(getattr(self, name), progress) for name in NAMES]


def _at(share: Share, progress: float) -> float:
    if isinstance(share, tuple | list):
        first, last = share
        return first + (last - first) * progress
    return share


class PredictionObjective(nn.Module):
    """The loss of a batch, by the prediction that is drawn for it. Its parameters are trained with the model, but not
    exported.

    Args:
        seed: of the prediction that is drawn for each batch.
        max_steps: of the run.

    Raises:
        ConfigError: a mixture for a generator that does not predict ids one after another, or a generator that takes no
            context.
    """

    def __init__(self, model: Generator, config: PredictionConfig, seed: int, max_steps: int):
        super().__init__()
        name = type(model).__name__
        if config.mixed and model.only_next:
            raise ConfigError(
                f"objective.{config.mixed[0]}: {name} cannot learn it: {model.only_next}. Leave next_all and random "
                "out; scheduled_sampling and token_noise remain"
            )
        if not model.takes_context:
            raise ConfigError(f"objective: the training pass of {name} takes no context; leave the section out")
        self.config, self.seed, self.max_steps = config, seed, max_steps
        self.target_positions = self.look_ahead = self.mask = None
        if config.mixed:
            attention = cast(AutoregressiveGenerator, model).blocks[0].attn
            dim = attention.head_dim * attention.num_heads
            if config.uses("next_all"):
                self.target_positions = nn.Parameter(torch.randn(model.spec.length, dim) * 0.02)
                self.look_ahead = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
            if config.uses("random"):
                self.mask = nn.Parameter(torch.randn(dim) * 0.02)

    def choose(self, step: int) -> Prediction:
        """The prediction for the batches of a step; it is the same on all processes."""
        drawn = Keys(self.seed, (0,), step).uniform("objective").item()
        shares = self.config.shares(step / self.max_steps)
        for name, share in zip(NAMES, shares):
            if drawn < share:
                return name
            drawn -= share
        return next(name for name, share in reversed(list(zip(NAMES, shares))) if share > 0)  # reached by rounding only

    def training_draws(self, keys: Keys, model: Generator) -> Draws:
        """The random tensors that ``forward`` consumes at the step of ``keys``, by name."""
        chosen, length = self.choose(keys.step), model.spec.length
        draws: Draws = {}
        if chosen == "random":
            return {"hidden": keys.uniform("objective masked", length)}
        if chosen == "next_all" and self.config.next_all_targets:
            draws["targets"] = keys.uniform("objective targets", length, self.config.next_all_targets)
        shape = model.context_shape
        if self.config.scheduled_sampling is not None:
            draws |= {"replaced": keys.uniform("objective replaced", shape[0])} | model.own_draws(keys)
        if self.config.token_noise:
            draws["noised"] = keys.uniform("objective noised", shape[0])
            draws["any"] = (keys.uniform if model.spec.discrete else keys.normal)("objective any", *shape)
        return draws

    def forward(
        self,
        model: Generator,
        tokens: Tensor,
        condition: Condition,
        clock: Clock,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> GeneratorOutput:
        """The loss of tokens (B, L[, D]); the metrics have it once more under the prediction's name."""
        chosen = self.choose(clock.step)
        if chosen == "random":
            output = self._random(cast(AutoregressiveGenerator, model), tokens, condition, draws)
        else:
            context = self.context(model, tokens, condition, clock, draws, tokenizer)
            if chosen == "next":
                output = model(tokens, condition, draws=draws, clock=clock, tokenizer=tokenizer, context=context)
            else:
                output = self._next_all(cast(AutoregressiveGenerator, model), tokens, context, condition, draws)
        output.metrics = output.metrics | {f"{chosen}_loss": output.loss.detach()}
        return output

    def context(
        self,
        model: Generator,
        tokens: Tensor,
        condition: Condition,
        clock: Clock,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor | None:
        """The context in place of tokens (B, L[, D]), in the form of ``Generator.context_of``; None if it is the tokens
        themselves."""
        context = None
        scheduled = self.config.scheduled_sampling
        share = 0.0 if scheduled is None else scheduled.at(clock.progress)
        if share > 0:
            replaced = model.replaced(draws["replaced"], share, draws)
            with torch.no_grad():
                own = model.own_tokens(tokens, replaced, condition, draws, tokenizer)
            context = _where(replaced, own, model.context_of(tokens))
        if self.config.token_noise:
            noise = draws["any"]
            if model.spec.discrete:
                noise = (noise * model.spec.num_ids).long().clamp_max(model.spec.num_ids - 1)
            given = model.context_of(tokens) if context is None else context
            context = _where(model.replaced(draws["noised"], self.config.token_noise, draws), noise, given)
        return context

    def next_all_logits(
        self, model: AutoregressiveGenerator, hidden: Tensor, places: Tensor, wanted: Tensor
    ) -> list[Tensor]:
        """Logits (B, L, m, V_p), for each part of ids, of m later tokens per position.

        Args:
            hidden: hidden states (B, L, D).
            places: (B or 1, L, m), the positions of the tokens.
            wanted: (B, L, m), the tokens; an id in parts is predicted part by part.
        """
        if self.target_positions is None or self.look_ahead is None:
            raise ValueError("this run predicts no tokens after the next")
        ahead = hidden[:, :, None] + self.look_ahead(hidden[:, :, None] + self.target_positions[places])
        parts = model.target_logits(ahead.flatten(1, 2), wanted.flatten(1))
        return [logits.unflatten(1, wanted.shape[1:]) for logits in parts]

    def _next_all(
        self,
        model: AutoregressiveGenerator,
        tokens: Tensor,
        context: Tensor | None,
        condition: Condition,
        draws: Draws,
    ) -> GeneratorOutput:
        """The cross entropy of token j given the tokens before k, averaged over targets j >= k, then over k, in the
        order in which the model predicts."""
        condition = model.drop_condition(condition, draws)
        entries = model.ordered_entries(tokens if context is None else context, condition, draws)
        hidden, length = _hidden(model, entries, condition), tokens.shape[1]
        first, uniforms = torch.arange(length, device=tokens.device), draws.get("targets")
        if uniforms is None:
            targets = first.expand(len(tokens), length, length)
            counted = (targets >= first[:, None]).float()
        else:
            left = (length - first)[:, None]
            targets = first[:, None] + (uniforms * left).long().clamp_max(left - 1)  # (B, L, m)
            counted = torch.ones_like(uniforms)
        order = entries.order.expand(len(tokens), -1)
        places = order.gather(1, targets.flatten(1)).view_as(targets)
        wanted = tokens.gather(1, places.flatten(1)).view_as(targets)
        logits = self.next_all_logits(model, hidden, places, wanted)
        losses = _cross_entropy(model, logits, wanted)  # (B, L, m)
        loss = ((losses * counted).sum(2) / counted.sum(2)).mean()
        return GeneratorOutput(loss, torch.cat(logits, -1))

    def _random(
        self, model: AutoregressiveGenerator, tokens: Tensor, condition: Condition, draws: Draws
    ) -> GeneratorOutput:
        """The mean cross entropy of masked tokens, given all others, with bidirectional attention.

        The token that the model predicts last is never an input, so it always counts as masked.
        """
        condition = model.drop_condition(condition, draws)
        chosen = draws["hidden"] < self.config.masked
        entries = model.ordered_entries(tokens.masked_fill(chosen, 0), condition, draws)
        order = entries.order.expand(len(tokens), -1)
        masked, wanted = chosen.gather(1, order), tokens.gather(1, order)
        masked[:, -1] = True
        hidden = _hidden(model, entries, condition, masked=masked, mask_vector=self.mask)
        logits = model.target_logits(hidden, wanted)
        losses = _cross_entropy(model, logits, wanted) * masked
        return GeneratorOutput((losses.sum(1) / masked.sum(1)).mean(), torch.cat(logits, -1))


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` (B, N[, D]) where chosen (B, N) is True, else ``other``."""
    return torch.where(chosen if other.ndim == 2 else chosen[..., None], one.to(other), other)


def _cross_entropy(model: AutoregressiveGenerator, logits: list[Tensor], ids: Tensor) -> Tensor:
    """Cross entropy (...) in nats of ids (...): the sum over their parts, each with logits (..., V_p)."""
    parts = zip(logits, model.split_ids(ids), strict=True)
    return torch.stack([F.cross_entropy(x.movedim(-1, 1), part, reduction="none") for x, part in parts]).sum(0)


def _hidden(
    model: AutoregressiveGenerator,
    entries: OrderedEntries,
    condition: Condition,
    *,
    masked: Tensor | None = None,
    mask_vector: Tensor | None = None,
) -> Tensor:
    """The hidden states (B, L, D) from which tokens are predicted, in order; that of token k depends on the tokens
    before it.

    Args:
        masked: (B, L) bool; ``mask_vector`` is added to the entries of masked tokens, and attention is bidirectional.
    """
    x, length = entries.x, entries.x.shape[1]
    mask = model.attention_mask(condition, 0, length)
    if masked is not None and mask_vector is not None:
        shift = torch.zeros_like(x)
        shift[:, entries.tokens] = (masked[:, :-1, None] * mask_vector).to(x)
        x = x + shift
        # The last entry attends to all entries that are valid.
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=x.device) if mask is None else mask[:, :, -1:]
        mask = mask.expand(-1, -1, length, -1)
    return model.transform(x, entries.positions, mask, None, *model.condition_state(condition))[:, entries.states]
