"""VAR's smooth sampling: mixtures of codes instead of drawn codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.generators.engine.sampling import filter_logits
from vistok.generators.engine.session import AutoregressiveSession
from vistok.types import TokenChunk

GUMBEL = "gumbel"
"""The name of the noise in the draws."""


class SmoothSession(AutoregressiveSession):
    """A session whose tokens are code vectors (B, L, D): at step k of n, with r = k / (n - 1), those of

        softmax((filtered logits (1 + r) + noise) / max(0.27 (1 - 0.95 r), 0.005)) @ codes

    Ids are drawn too, but not used. At temperature 0 there is no noise.
    """

    @torch.no_grad()
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        expander: Any = self.expander  # of a tokenizer with a codebook
        self._codes = expander.codes.to(self.sequence.device, torch.float32)  # (V, D)
        self._vectors = self._codes.new_zeros(*self.sequence.shape, self._codes.shape[1])

    @property
    def tokens(self) -> Tensor:
        """The code vectors so far, (B, count, D)."""
        return self._vectors[:, : self.count]

    def append(self, tokens: Tensor) -> None:
        first = self.count
        super().append(tokens)
        self._vectors[:, first : self.count] = self._codes[self.sequence[:, first : self.count]]

    def next_logits(self, parts: Sequence[Tensor] = ()) -> Tensor:
        logits = super().next_logits(parts)  # (B, n, V)
        options, steps, here = self.options, len(self.plan), self._upcoming()
        ratio = self.step / (steps - 1) if steps > 1 else 1.0
        kept = filter_logits(logits, temperature=options.temperature or 1.0, top_k=options.top_k, top_p=options.top_p)
        noise = self.draws[GUMBEL][:, here] if options.temperature else 0.0
        shares = ((kept * (1 + ratio) + noise) / max(0.27 * (1 - 0.95 * ratio), 0.005)).softmax(-1)
        self._vectors[:, here] = shares @ self._codes
        return logits

    def commit(self, parts: Sequence[Tensor]) -> TokenChunk:
        vectors, chunk = self._vectors[:, self._upcoming()], super().commit(parts)
        return TokenChunk(chunk.positions, vectors, chunk.valid)

    def _upcoming(self) -> slice:
        """The tokens of the next step."""
        return slice(self.plan.bounds[self.step], self.plan.bounds[self.step + 1])

    def _inputs(self, here: slice) -> Tensor:
        return self._expanded(self._vectors[:, here])
