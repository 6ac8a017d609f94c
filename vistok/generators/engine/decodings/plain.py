"""Plain sampling: one step after another, each drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from vistok.draws import Draws, Keys
from vistok.generators.engine.contracts import SamplingSession
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, draw_ids, part_draws
from vistok.types import TokenChunk


@dataclass(frozen=True)
class Plain:
    """Tokens of one step are drawn independently of each other."""

    def draws(self, keys: Keys, length: int, options: DecodingOptions) -> Draws:
        """ "ids" (B, L), a uniform number for each token in the order of generation."""
        return {"ids": keys.uniform("ids", length)}

    def check(self, plan: Plan, options: DecodingOptions, num_parts: int) -> None:
        """Any plan and any number of parts is allowed."""

    def run(self, session: SamplingSession, stop: int) -> Iterator[TokenChunk]:
        bounds = session.plan.bounds
        for step in range(session.step, stop):
            chunk = session.run_compiled()
            if chunk is None:
                chunk = session.commit(self._draw(session, slice(bounds[step], bounds[step + 1])))
            yield chunk

    def _draw(self, session: SamplingSession, here: slice) -> list[Tensor]:
        """The ids (B, n) of the next step, in their parts."""
        parts: list[Tensor] = []
        for part, name in enumerate(part_draws(session.num_parts)):
            logits = session.next_logits(parts)  # (B, n, V)
            uniforms = session.draws[name][:, here] if name in session.draws else None
            parts.append(draw_ids(logits, uniforms, session.options.of_part(part)))
        return parts
