"""Speculative Jacobi decoding (SJD, arXiv 2410.01699): several tokens per pass, from the model's own distribution.

A pass feeds the last token and drafts of the next ones. Drafts are accepted from left to right by the test of
speculative sampling, against the distributions that they were drawn from in the pass before. The first rejected draft
is redrawn; the positions after it get new drafts for the next pass. Decoding needs no training, and each token follows
the distribution of plain sampling. Every row commits as many tokens as its own drafts allow.

Random numbers are keyed by position. A position is committed once, so the numbers that test and redraw it count once;
the number that its drafts are drawn with serves all passes. This keeps the distribution: the test of a draft depends on
the positions before it, and these never see what the draft's number decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.draws import Draws, Keys, inverse_cdf
from vistok.generators.engine.contracts import SamplingSession
from vistok.generators.engine.decodings.plain import Plain
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, filter_logits
from vistok.types import TokenChunk

TURN = 0.6180339887  # added to a position's number in each pass (modulo 1, so it stays uniform) unless coupled


class Verdict(NamedTuple):
    """The result of testing a window's drafts.

    Attributes:
        matched: (B,) how many tokens are committed: the accepted drafts and one more.
        rejected: (B,) bool, whether the last of them replaces a rejected draft.
        residual: (B, V), the distribution of that replacement; zeros if no draft was rejected.
    """

    matched: Tensor
    rejected: Tensor
    residual: Tensor


def verify(drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Test drafts by speculative sampling: the i-th is accepted if u < min(1, p / q).

    Args:
        drafts: (B, n) ids; the first is the last committed token, and the others drafts.
        draft_probs: (B, n, V), what each draft was drawn from, q.
        target_probs: (B, n, V), entry i is the distribution p of the token after position i.
        uniforms: (B, n), entry i tests draft i.
    """
    ids = drafts[:, 1:, None]
    p, q = target_probs[:, :-1].gather(2, ids), draft_probs[:, 1:].gather(2, ids)
    accepted = uniforms[:, 1:] < (p / q).squeeze(2).clamp_max(1)
    matched = 1 + accepted.int().cumprod(1).sum(1)
    rejected = matched < drafts.shape[1]
    target = _at(target_probs, matched - 1)
    excess = (target - _at(draft_probs, matched.clamp_max(drafts.shape[1] - 1))).clamp_min(0)
    total = excess.sum(-1, keepdim=True)
    # In exact arithmetic the excess of a rejected draft is positive; rounding may make it zero.
    residual = torch.where(total > 0, excess / total, target)
    return Verdict(matched, rejected, residual * rejected[:, None])


def agree(drafts: Tensor, next_tokens: Tensor) -> Tensor:
    """(B,) how many tokens are committed: the drafts (B, n) before the first that differs from the id drawn now, and
    one more.

    Args:
        next_tokens: (B, n), the id drawn now for the position after each draft.
    """
    return 1 + (drafts[:, 1:] == next_tokens[:, :-1]).int().cumprod(1).sum(1)


def settled(drafts: Tensor, next_tokens: Tensor, matched: Tensor, last: Tensor) -> Tensor:
    """(B, n) the tokens after each position: accepted drafts, then ``last`` (B,), then the drafts of the next pass."""
    index = torch.arange(drafts.shape[1], device=drafts.device)
    following = F.pad(drafts[:, 1:], (0, 1))
    tokens = torch.where(index < matched[:, None] - 1, following, next_tokens)
    return torch.where(index == matched[:, None] - 1, last[:, None], tokens)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, n, V) at one position (B,) of each row: (B, V)."""
    return values.gather(1, index[:, None, None].expand(-1, 1, values.shape[2])).squeeze(1)


@dataclass(frozen=True)
class Jacobi:
    """The decoding; its settings are in ``DecodingOptions``."""

    def draws(self, keys: Keys, length: int, options: DecodingOptions) -> Draws:
        """Five uniform numbers (B, L) for every position: "draft" makes the first draft, "accept" decides on a draft,
        "redraw" draws the id that replaces a rejected one, "ids" draws an id, and "coupling" is the key of the Gumbel
        noise of all ids."""
        return {name: keys.uniform(name, length) for name in ("ids", "accept", "redraw", "draft", "coupling")}

    def check(self, plan: Plan, options: DecodingOptions, num_parts: int) -> None:
        if num_parts > 1:
            raise ValueError(
                f"decoding 'jacobi' guesses whole ids, and this model draws them in {num_parts} parts: take decoding "
                "'plain'"
            )
        if not (plan.is_single and plan.is_raster):
            way = "in another order" if plan.is_single else f"{max(plan.sizes)} in a step, independent of each other"
            raise ValueError(
                f"decoding 'jacobi' guesses tokens that follow each other; this model generates them {way}: take "
                "decoding 'plain'"
            )

    def run(self, session: SamplingSession, stop: int) -> Iterator[TokenChunk]:
        if session.step < stop:
            yield from Plain().run(session, session.step + 1)  # leaves exactly one token to feed, as windows need
        if session.step < stop:
            yield from _JacobiLoop(session, stop).run()


class _JacobiLoop:
    """The passes from the session's step up to ``stop``."""

    def __init__(self, session: SamplingSession, stop: int):
        self.session, self.stop, self.options = session, stop, session.options
        self.size = min(self.options.window, stop - session.step)
        self.index = torch.arange(self.size, device=session.tokens.device)
        self.count = torch.full((len(session.tokens),), session.step, device=session.tokens.device)
        self.length = session.plan.order.shape[1]
        self.width = session.grid_width or 0
        if not self.width and self.options.draft != "random":
            raise ValueError(
                f"draft {self.options.draft!r} looks to the left or above, and these tokens lie on no raster: take "
                "draft 'random'"
            )

    def run(self) -> Iterator[TokenChunk]:
        window, passes = self.session.open_window(self.size), 0
        drafts, probs = self._first_drafts()
        while True:
            logits = window.logits(drafts, self.count)  # (B, n, V)
            target, drawn = self._draw(logits, passes)
            matched, last = self._test(drafts, probs, target, drawn)
            tokens = settled(drafts, drawn, matched, last)
            kept = torch.minimum(matched, self.stop - self.count)
            yield window.commit(tokens, self.count, kept)
            self.count = self.count + kept
            if bool((self.count == self.stop).all()):  # the only synchronisation of a pass
                break
            drafts, probs = self._next_drafts(drafts, tokens, target, kept)
            passes += 1
        window.close(self.stop)

    def _numbers(self, name: str, places: Tensor) -> Tensor:
        """The random numbers of positions (B, n); constant if sampling is deterministic."""
        if name not in self.session.draws:
            return torch.full(places.shape, 0.5, device=places.device)
        return self.session.draws[name].gather(1, places.clamp(0, self.length - 1))

    def _places(self) -> Tensor:
        """(B, n), the places that the entries of the window predict."""
        return self.count[:, None] + self.index

    def _draw(self, logits: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """The distributions (B, n, V) of the tokens after each entry, and ids (B, n) drawn from them."""
        options = self.options
        if options.temperature == 0:
            ids = logits.argmax(-1)
            return F.one_hot(ids, logits.shape[-1]).float(), ids
        logits = filter_logits(logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        probs, places = logits.softmax(-1), self._places()
        if options.coupled and options.criterion == "speculative":
            noise = gumbel(self._numbers("coupling", places), logits.shape[-1])
            return probs, (probs.log() + noise).argmax(-1)
        numbers = self._numbers("ids", places)
        if options.criterion == "speculative":
            numbers = (numbers + passes * TURN) % 1
        ids = inverse_cdf(probs.flatten(0, 1), numbers.flatten())
        return probs, ids.view(places.shape)

    def _test(self, drafts: Tensor, probs: Tensor, target: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens each row commits, (B,), and the last of them, (B,)."""
        if self.options.criterion == "exact":
            matched = agree(drafts, drawn)
            return matched, drawn.gather(1, matched[:, None] - 1).squeeze(1)
        numbers = self._numbers("accept", self._places() - 1)
        verdict = verify(drafts, probs, target, numbers)
        here = verdict.matched[:, None] - 1
        again = inverse_cdf(verdict.residual, self._numbers("redraw", self._places().gather(1, here)).squeeze(1))
        return verdict.matched, torch.where(verdict.rejected, again, drawn.gather(1, here).squeeze(1))

    def _first_drafts(self) -> tuple[Tensor, Tensor]:
        """The last token and new drafts, (B, n), and the distributions (B, n, V) that they were drawn from."""
        last = self.session.tokens[:, -1:]
        window = F.pad(last, (0, self.size - 1))
        probs = torch.zeros(*window.shape, self.session.vocabulary_size, device=window.device)
        return self._refresh(window, probs, self.index.expand_as(window) > 0)

    def _next_drafts(self, drafts: Tensor, tokens: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The window moved on by ``kept`` (B,) positions; it begins with the last committed token."""
        both = torch.cat([drafts[:, :1], tokens], 1)  # a finished row keeps its last token
        index = kept[:, None] + self.index  # (B, n)
        window = both.gather(1, index.clamp_max(self.size))
        source = (index - 1).clamp(0, self.size - 1)[..., None].expand_as(target)
        return self._refresh(window, target.gather(1, source), index > self.size)

    def _refresh(self, window: Tensor, probs: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Put new drafts where ``fresh`` (B, n) is True."""
        places, vocabulary = self._places() - 1, probs.shape[2]
        random = (self._numbers("draft", places) * vocabulary).long().clamp_max(vocabulary - 1)
        window = torch.where(fresh, random, window)
        probs = torch.where(fresh[..., None], 1 / vocabulary, probs)
        if self.options.draft == "random":
            return window, probs
        back = 1 if self.options.draft == "repeat_left" else self.width
        known = F.pad(self.session.sequence, (0, self.size)).scatter(1, places, window)
        for i in range(1, self.size):
            here = places[:, i : i + 1]
            has_source = (here % self.width > 0) if back == 1 else (here >= self.width)
            repeated = fresh[:, i : i + 1] & has_source
            source = known.gather(1, (here - back).clamp_min(0))
            value = torch.where(repeated, source, window[:, i : i + 1])
            known = known.scatter(1, here, value)
            window = torch.cat([window[:, :i], value, window[:, i + 1 :]], 1)
            certain = F.one_hot(value, vocabulary).to(probs)
            probs[:, i : i + 1] = torch.where(repeated[..., None], certain, probs[:, i : i + 1])
        return window, probs


def gumbel(numbers: Tensor, vocabulary_size: int) -> Tensor:
    """Gumbel noise (B, n, V) as a function of numbers (B, n) in [0, 1). It is recomputed in each pass, because it is
    too large to keep. A number and an id are mixed as in MurmurHash3."""
    keys = (numbers.double() * (1 << 53)).long()[..., None]
    # The first factor is 2^64 over the golden ratio; all are unsigned numbers written as signed ones.
    mixed = keys + torch.arange(1, vocabulary_size + 1, device=keys.device) * -0x61C8864680B583EB
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        mixed = (mixed ^ (mixed >> 33 & 0x7FFFFFFF)) * factor
    uniform = ((mixed ^ (mixed >> 33 & 0x7FFFFFFF)) >> 11 & ((1 << 24) - 1)).float()
    return -(-((uniform + 0.5) / (1 << 24)).log()).log()
