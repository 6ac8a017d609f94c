"""The protocols between the parts of the engine: models, sessions, decodings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.draws import Draws, Keys
from vistok.generators.engine.cache import CachedLayers, KVCache
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.rotary import Positions
from vistok.types import Condition, TokenChunk, TokenSpec


class NextTokenModel(Protocol):
    """What sampling needs of a model; ``AutoregressiveGenerator`` documents it. All blocks have one class."""

    spec: TokenSpec
    condition_length: int
    num_parts: int
    blocks: ModuleList[Any]  # with an ``attn`` each

    @property
    def num_entries(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def plan(self, draws: Draws) -> Plan: ...

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]: ...

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor: ...

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor: ...

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None: ...

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor: ...

    def entry_logits(self, hidden: Tensor) -> Tensor: ...

    def step_logits(self, hidden: Tensor, count: int) -> Tensor: ...

    def part_logits(self, hidden: Tensor, count: int, parts: Sequence[Tensor]) -> Tensor: ...

    def split_ids(self, ids: Tensor) -> Sequence[Tensor]: ...

    def join_ids(self, parts: Sequence[Tensor]) -> Tensor: ...

    def new_cache(self, rows: int, length: int) -> KVCache: ...


class SamplingSession(Protocol):
    """What a decoding needs of a session; ``AutoregressiveSession`` documents it."""

    plan: Plan
    options: DecodingOptions
    draws: Draws
    step: int
    sequence: Tensor
    num_parts: int

    @property
    def tokens(self) -> Tensor: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def grid_width(self) -> int | None: ...

    def next_logits(self, parts: Sequence[Tensor] = ()) -> Tensor: ...

    def commit(self, parts: Sequence[Tensor]) -> TokenChunk: ...

    def run_compiled(self) -> TokenChunk | None: ...

    def open_window(self, size: int) -> WindowPasses: ...

    def choose(self, rows: Tensor) -> None: ...


class WindowPasses(Protocol):
    """Passes over guessed tokens; ``Windows`` documents them."""

    def logits(self, ids: Tensor, counts: Tensor) -> Tensor: ...

    def commit(self, ids: Tensor, counts: Tensor, kept: Tensor) -> TokenChunk: ...

    def close(self, step: int) -> None: ...


class Decoding(Protocol):
    """A way of choosing ids."""

    def draws(self, keys: Keys, length: int, options: DecodingOptions) -> Draws:
        """The random tensors that the loop consumes for ``length`` tokens."""

    def check(self, plan: Plan, options: DecodingOptions, num_parts: int) -> None:
        """Raise ValueError if it cannot generate the steps of ``plan``, or ids of ``num_parts`` parts."""

    def run(self, session: SamplingSession, stop: int) -> Iterator[TokenChunk]:
        """Generate the tokens of the steps from the session's current one up to, not including, ``stop``."""
