"""Cautious sampling: where the model is unsure, several continuations are drawn, and the likeliest is kept.

TokenUnify (arXiv 2405.16847) names accumulated errors as the weakness of next-token prediction. Here a row of the
raster is drawn several times if the entropy of its first token exceeds a threshold. The result is not a sample of the
model's distribution: it is biased to likely images. All continuations are one batch of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.draws import Draws, Keys
from vistok.generators.engine.contracts import SamplingSession
from vistok.generators.engine.decodings.plain import Plain
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.types import TokenChunk


@dataclass(frozen=True)
class Cautious:
    """The decoding; its settings are in ``DecodingOptions``."""

    def draws(self, keys: Keys, length: int, options: DecodingOptions) -> Draws:
        """Uniform numbers: "ids" (B, L) of the first continuation, as in plain sampling, and "trials"
        (B, L, trials - 1) of the others."""
        return {"ids": keys.uniform("ids", length), "trials": keys.uniform("trials", length, options.trials - 1)}

    def check(self, plan: Plan, options: DecodingOptions, num_parts: int) -> None:
        if num_parts > 1 or not (plan.is_single and plan.is_raster):
            raise ValueError(
                "decoding 'cautious' draws whole ids that follow each other in the raster; this model draws others: "
                "take decoding 'plain'"
            )
        if options.temperature == 0:
            raise ValueError(
                "decoding 'cautious' compares draws, and at temperature 0 all are alike: take a temperature above 0, "
                "or decoding 'plain'"
            )

    def run(self, session: SamplingSession, stop: int) -> Iterator[TokenChunk]:
        options, most = session.options, math.log(session.vocabulary_size)
        if options.entropy_threshold >= most:
            raise ValueError(
                f"entropy_threshold must be below {most:.3f}, the entropy in nats of {session.vocabulary_size} equally "
                f"likely ids, got {options.entropy_threshold}"
            )
        length = options.trial_length or session.grid_width
        if length is None:
            raise ValueError(
                "trial_length 0 is a row of the raster, and these tokens lie on none: give a number of tokens"
            )
        while session.step < stop:
            end = min((session.step // length + 1) * length, stop)
            unsure = (_entropy(session.next_logits()[:, 0]) > options.entropy_threshold).tolist()
            if any(unsure) and options.trials > 1:
                yield self._best(session, unsure, end)
            else:
                yield from Plain().run(session, end)

    def _best(self, session: SamplingSession, unsure: list[bool], end: int) -> TokenChunk:
        """Draw the tokens of the steps up to ``end`` several times in the rows that are unsure, and keep the likeliest
        continuation of each."""
        start, device = session.step, session.sequence.device
        copies = [session.options.trials if row else 1 for row in unsure]
        owners = torch.repeat_interleave(torch.arange(len(copies)), torch.tensor(copies)).to(device)
        trials = torch.cat([torch.arange(count) for count in copies]).to(device)
        numbers = torch.cat([session.draws["ids"][..., None], session.draws["trials"]], 2)[owners, :, trials]
        session.choose(owners)
        likelihood = torch.zeros(len(owners), device=device)
        for step in range(start, end):
            logits = session.next_logits()[:, 0]  # (rows, V)
            ids = draw_ids(logits, numbers[:, step], session.options)
            likelihood += logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            session.commit([ids[:, None]])
        ends = torch.tensor(copies).cumsum(0).tolist()
        best = [int(part.argmax()) + last - len(part) for part, last in zip(likelihood.split(copies), ends)]
        session.choose(torch.tensor(best, device=device))
        places = torch.arange(start, end, device=device).expand(len(copies), -1)
        tokens = session.sequence[:, start:end]
        return TokenChunk(places, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _entropy(logits: Tensor) -> Tensor:
    """The entropy in nats, (B,), of logits (B, V)."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1)
