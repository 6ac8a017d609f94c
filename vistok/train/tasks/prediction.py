"""What a generator of ids, one after another, is trained to predict: the next token, all later ones, or hidden ones.

TokenUnify (Chen et al., arXiv 2405.16847) trains one network by these three predictions; here they are of ids, and one
of them is drawn for each batch. Scheduled sampling (Bengio et al., arXiv 1506.03099) feeds a share of tokens that the
model itself draws, in one extra pass for all of them, as Mihaylova & Martins do for transformers (arXiv 1906.07651).
Samplers do not change: of all this only the model is exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.config import ConfigError, check_least
from vistok.draws import Draws, Keys, inverse_cdf
from vistok.generators.base import Generator
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.types import Clock, Condition, Expands, GeneratorOutput

Prediction = Literal["next", "next_all", "random"]
Share = float | tuple[float, float]
NAMES: tuple[Prediction, ...] = ("next", "next_all", "random")


@dataclass(frozen=True)
class ScheduledSampling:
    """Context tokens that the model draws itself.

    Attributes:
        share: of them, at ``end`` and after it.
        start, end: the progress of the run, 0 to 1, from which and up to which the share rises from 0, evenly.
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
        next, next_all, random: how often each prediction is drawn for a batch; they add up to 1. Two numbers are the
            shares at the beginning and at the end of the run, between which they change evenly.
        next_all_targets: how many of the later tokens each position predicts, drawn anew; 0 is all of them.
        masked: share of the tokens that ``random`` leaves out.
        scheduled_sampling: of the context of ``next`` and ``next_all``; None feeds the data alone.
        token_noise: share of that context that is any id instead.
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
                    f"the shares of next, next_all and random must be positive and add up to 1; at the {when} they are "
                    f"{told}, {sum(shares.values()):g} in all"
                )
        if not 0 < self.masked <= 1:
            raise ValueError(f"masked must lie in (0, 1], the share of tokens that are left out; got {self.masked}")
        if not 0 <= self.token_noise < 1:
            raise ValueError(f"token_noise must lie in [0, 1), a share of the context; got {self.token_noise}")

    @property
    def is_plain(self) -> bool:
        """Whether this is the generator's own training."""
        return self == PredictionConfig(next_all_targets=self.next_all_targets, masked=self.masked)

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
    """The loss of a batch by the prediction that is drawn for it. Its parameters are trained with the model, and end
    with the run.

    Args:
        seed: of what is drawn for each batch.
        max_steps: of the run.

    Raises:
        ConfigError: a generator that does not predict one id after another in raster order.
    """

    def __init__(self, model: Generator, config: PredictionConfig, seed: int, max_steps: int):
        super().__init__()
        if not isinstance(model, AutoregressiveGenerator) or not model.trains_in_sequence:
            changed = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
            raise ConfigError(
                f"objective.{changed[0]}: {type(model).__name__} does not predict one id after another in raster order "
                "in training, and has an objective of its own; leave the section out"
            )
        self.config, self.seed, self.max_steps = config, seed, max_steps
        length = model.spec.length
        dim = model.blocks[0].attn.head_dim * model.blocks[0].attn.num_heads
        self.target_positions = self.look_ahead = self.mask = None
        if config.uses("next_all"):
            self.target_positions = nn.Parameter(torch.randn(length, dim) * 0.02)
            self.look_ahead = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        if config.uses("random"):
            self.mask = nn.Parameter(torch.randn(dim) * 0.02)

    def choose(self, step: int) -> Prediction:
        """The prediction of the batch of a step, the same on all processes."""
        drawn = Keys(self.seed, (0,), step).uniform("objective").item()
        shares = self.config.shares(step / self.max_steps)
        for name, share in zip(NAMES, shares):
            if drawn < share:
                return name
            drawn -= share
        return next(name for name, share in reversed(list(zip(NAMES, shares))) if share > 0)  # but for rounding

    def training_draws(self, keys: Keys, length: int) -> Draws:
        """What ``forward`` draws from at the step of ``keys``, uniform numbers by name."""
        chosen, draws = self.choose(keys.step), {}
        if chosen == "random":
            return {"masked": keys.uniform("objective masked", length)}
        if chosen == "next_all" and self.config.next_all_targets:
            draws["targets"] = keys.uniform("objective targets", length, self.config.next_all_targets)
        if self.config.scheduled_sampling is not None:
            draws["own"] = keys.uniform("objective own", length, 2)
        if self.config.token_noise:
            draws["any"] = keys.uniform("objective any", length, 2)
        return draws

    def forward(
        self,
        model: AutoregressiveGenerator,
        tokens: Tensor,
        condition: Condition,
        clock: Clock,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> GeneratorOutput:
        """The loss of tokens (B, L), in nats per token, and its value by the prediction's name among the metrics."""
        chosen = self.choose(clock.step)
        if chosen == "random":
            output = self._random(model, tokens, _dropped(model, condition, draws), draws["masked"])
        else:
            context = self.context(model, tokens, condition, clock, draws)
            if chosen == "next":
                output = model(tokens, condition, draws=draws, clock=clock, tokenizer=tokenizer, context=context)
            else:
                given = tokens if context is None else context
                output = self._next_all(model, tokens, given, _dropped(model, condition, draws), draws.get("targets"))
        output.metrics = output.metrics | {f"{chosen}_loss": output.loss.detach()}
        return output

    def context(
        self, model: AutoregressiveGenerator, tokens: Tensor, condition: Condition, clock: Clock, draws: Draws
    ) -> Tensor | None:
        """The ids (B, L) that are fed in place of tokens (B, L); None where these are fed."""
        context = None
        scheduled = self.config.scheduled_sampling
        share = 0.0 if scheduled is None else scheduled.at(clock.progress)
        if share > 0:
            with torch.no_grad():
                logits = model.logits(tokens, _dropped(model, condition, draws))
                numbers = draws["own"][..., 1].flatten()
                own = inverse_cdf(logits.softmax(-1).flatten(0, 1), numbers).clamp_max(logits.shape[-1] - 1)
            context = torch.where(draws["own"][..., 0] < share, own.view_as(tokens), tokens)
        if self.config.token_noise:
            size = model.spec.num_ids
            noise = (draws["any"][..., 1] * size).long().clamp_max(size - 1)
            given = tokens if context is None else context
            context = torch.where(draws["any"][..., 0] < self.config.token_noise, noise, given)
        return context

    def next_all_logits(self, model: AutoregressiveGenerator, hidden: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, L, m, V) of the tokens at the places targets (B or 1, L, m), from hidden states (B, L, D) each."""
        if self.target_positions is None or self.look_ahead is None:
            raise ValueError("this run predicts no tokens after the next")
        x = hidden[:, :, None] + self.target_positions[targets]
        return model.head(hidden[:, :, None] + self.look_ahead(x))

    def _next_all(
        self,
        model: AutoregressiveGenerator,
        tokens: Tensor,
        context: Tensor,
        condition: Condition,
        uniforms: Tensor | None,
    ) -> GeneratorOutput:
        """The mean over positions k of the mean over targets j >= k of the cross entropy of token j, given those before
        k."""
        hidden, length = _hidden(model, context, condition), tokens.shape[1]
        first = torch.arange(length, device=tokens.device)
        if uniforms is None:
            targets = first.expand(1, length, length)
            counted = (targets >= first[:, None]).float()
        else:
            left = (length - first)[:, None]
            targets = first[:, None] + (uniforms * left).long().clamp_max(left - 1)  # (B, L, m)
            counted = torch.ones_like(uniforms)
        logits = self.next_all_logits(model, hidden, targets)
        wanted = tokens[:, None].expand(-1, length, -1).gather(2, targets.expand(len(tokens), -1, -1))
        losses = F.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none")  # (B, L, m)
        loss = ((losses * counted).sum(2) / counted.sum(2)).mean()
        return GeneratorOutput(loss, logits)

    def _random(
        self, model: AutoregressiveGenerator, tokens: Tensor, condition: Condition, uniforms: Tensor
    ) -> GeneratorOutput:
        """The mean cross entropy of tokens that are left out, given all others: attention goes both ways.

        The last token is never fed, so that it always counts as left out.
        """
        masked = uniforms < self.config.masked
        masked[:, -1] = True
        hidden = _hidden(model, tokens, condition, masked=masked, mask_vector=self.mask)
        logits = model.head(hidden)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * masked
        return GeneratorOutput((losses.sum(1) / masked.sum(1)).mean(), logits)


def _dropped(model: AutoregressiveGenerator, condition: Condition, draws: Draws) -> Condition:
    return condition.drop(draws["drop"] < model.condition_dropout) if "drop" in draws else condition


def _hidden(
    model: AutoregressiveGenerator,
    ids: Tensor,
    condition: Condition,
    *,
    masked: Tensor | None = None,
    mask_vector: Tensor | None = None,
) -> Tensor:
    """The hidden states (B, L, D) that ids (B, L) are predicted from, the k-th fed those before k.

    Args:
        masked: (B, L), which ids are not seen, an entry with ``mask_vector`` in their place; attention goes both ways.
    """
    given = ids if masked is None else ids.masked_fill(masked, 0)
    x, first = model.embed_sequence(given[:, :-1], condition), model.condition_length
    length = x.shape[1]
    mask = model.attention_mask(condition, 0, length)
    if masked is not None and mask_vector is not None:
        shift = masked[:, :-1, None] * mask_vector
        x = torch.cat([x[:, :first], x[:, first:] + shift], 1)
        # The last entry sees all that may be seen.
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=ids.device) if mask is None else mask[:, :, -1:]
        mask = mask.expand(-1, -1, length, -1)
    hidden = model.transform(x, slice(0, length), mask, None, *model.condition_state(condition))
    return hidden[:, first - 1 :]
