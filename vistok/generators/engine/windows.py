"""Passes over several guessed tokens at once; each row of the batch is at a place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.generators.engine.cache import KVCache
from vistok.generators.engine.contracts import NextTokenModel
from vistok.guidance import Guidance, Weights
from vistok.types import Condition, TokenChunk


class WindowedSession(Protocol):
    """What ``Windows`` needs of ``AutoregressiveSession``; see there."""

    kv_cache: KVCache
    guidance: Guidance
    combine: Callable[[Tensor, Weights], Tensor]
    weights: list[Weights]
    rows: Condition
    state: tuple[Tensor, ...]
    sequence: Tensor
    forced: tuple[Tensor, Tensor] | None
    failed: Tensor
    step: int
    seen: int

    def network(self) -> NextTokenModel: ...


class Windows:
    """Passes of ``size`` entries per row; each row keeps the first of them, as many as were accepted."""

    def __init__(self, session: WindowedSession, size: int):
        self._session, self._offset = session, session.network().condition_length
        device, self._length = session.sequence.device, session.sequence.shape[1]
        self._index = torch.arange(size, device=device)
        self._slots = torch.zeros(len(session.rows), size, dtype=torch.int64, device=device)
        self._layers = session.kv_cache.at(self._slots)
        self._weights = torch.tensor(session.weights, device=device)
        self._kept: Tensor | None = None  # entries that each row keeps of the pass before

    def logits(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Guided logits (B, n, V) of the places from ``counts`` (B,) on; ids (B, n) are those of the places before."""
        session, model, cache = self._session, self._session.network(), self._session.kv_cache
        self._cut()
        places = counts[:, None] - 1 + self._index
        repeat = session.guidance.repeat
        # Places beyond the end are clamped, and never used. The last token is never fed, so tables may lack its row.
        self._slots.copy_(repeat(places + self._offset).clamp_max(cache.capacity - 1))
        fed = repeat(places.clamp_max(max(self._length - 2, 0)))
        x = model.embed_tokens(repeat(ids), fed, fed + 1)
        positions = cache.positions(fed + self._offset)
        hidden = model.transform(x, positions, cache.seen_from(self._slots), self._layers, *session.state)
        predicted = (places + 1).clamp_max(self._length - 1)
        weights = self._weights[predicted].permute(2, 0, 1)[..., None]  # (rows, B, n, 1)
        logits = session.combine(model.entry_logits(hidden), weights)
        failed = torch.where(logits.sum(-1).isfinite(), self._length, predicted).amin()
        session.failed.copy_(torch.minimum(session.failed, failed))
        if session.forced is None:
            return logits
        return only_forced(logits, *(values.gather(1, predicted) for values in session.forced))

    def commit(self, ids: Tensor, counts: Tensor, kept: Tensor) -> TokenChunk:
        """Set the first ``kept`` (B,) of ids (B, n) at the places from ``counts`` (B,) on."""
        session, places = self._session, counts[:, None] + self._index
        valid = places < (counts + kept)[:, None]
        padded = F.pad(session.sequence, (0, len(self._index)))
        padded = padded.scatter(1, places, torch.where(valid, ids, padded.gather(1, places)))
        session.sequence.copy_(padded[:, : self._length])
        self._kept = session.guidance.repeat(kept)
        return TokenChunk(places.clamp_max(self._length - 1), ids, valid)

    def close(self, step: int) -> None:
        """End the passes: all rows have the tokens of the steps before ``step``, and only the last was not fed yet."""
        self._cut()
        self._session.step, self._session.seen = step, step - 1
        self._session.kv_cache.settle(self._offset + step - 1)

    def _cut(self) -> None:
        if self._kept is not None:
            for layer in self._layers:
                layer.cut(self._kept)
        self._kept = None


def only_forced(logits: Tensor, ids: Tensor, where: Tensor) -> Tensor:
    """Logits (B, n, V), masked so that only ids (B, n) can be drawn where ``where`` (B, n) is True."""
    others = torch.arange(logits.shape[2], device=ids.device) != ids[..., None]
    return logits.masked_fill(where[..., None] & others, -torch.inf)
