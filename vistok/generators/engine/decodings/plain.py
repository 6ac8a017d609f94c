"""One step after another, each drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vistok.draws import Draws, Keys
from vistok.generators.engine.contracts import SamplingSession
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.types import TokenChunk


@dataclass(frozen=True)
class Plain:
    """Tokens of one step are drawn independently of each other."""

    def draws(self, keys: Keys, length: int, options: DecodingOptions) -> Draws:
        """ "ids" (B, L), a uniform number for each token in the order of generation."""
        return {"ids": keys.uniform("ids", length)}

    def check(self, plan: Plan, options: DecodingOptions) -> None:
        """It generates any steps."""

    def run(self, session: SamplingSession, stop: int) -> Iterator[TokenChunk]:
        bounds = session.plan.bounds
        for step in range(session.step, stop):
            chunk = session.run_compiled()
            if chunk is None:
                logits = session.next_logits()  # (B, n, V)
                uniforms = session.draws["ids"][:, bounds[step] : bounds[step + 1]] if "ids" in session.draws else None
                chunk = session.commit(draw_ids(logits, uniforms, session.options))
            yield chunk
