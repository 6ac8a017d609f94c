"""Single-token decoding steps as one compiled graph of fixed shapes.

An eager step of a large transformer is several hundred small kernels, and on a GPU the host cannot launch them as fast
as they run. A compiled step is fewer kernels; captured in a CUDA graph, they cost one launch per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from vistok.generators.cache import KVCache, Layers
from vistok.generators.sampling import DecodingOptions, draw_ids, guide
from vistok.nn.rotary import Rows

CompiledStep = Callable[..., None]


class NextTokenModel(Protocol):
    """What a step needs of an ``AutoregressiveGenerator``."""

    condition_length: int

    def embed_tokens(self, ids: Tensor, where: Rows) -> Tensor: ...

    def transform(self, x: Tensor, where: Rows, mask: Tensor | None, layers: Layers | None) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...


def compile_step(backend: str) -> CompiledStep:
    """``sample_next`` for torch.compile's ``backend``; compiled anew for every model, batch size and set of options."""
    limits = torch._dynamo.config  # of graphs per function in one process: a sweep over options takes more than 8
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return torch.compile(sample_next, backend=backend, fullgraph=True, dynamic=False)


def sample_next(
    model: NextTokenModel,
    options: DecodingOptions,
    position: Tensor,
    fed: Tensor,
    tokens: Tensor,
    uniforms: Tensor | None,
    scales: Tensor | None,
    visible: Tensor | None,
    layers: Layers,
) -> None:
    """Feed the token before ``position`` and write the one there into ``tokens``.

    Args:
        position: (1,) int64 image position, at least 1.
        fed: (1,) int64, the sequence position of the token before.
        tokens: (B, L) ids.
        uniforms: (B, L), or None for greedy decoding.
        scales: (L,) guidance scales, or None without guidance.
        visible: bool (R or 1, 1, 1, T + L), what the last position of all sees; None is everything.
        layers: caches that write at ``fed``.
    """
    ids = tokens[:, position - 1]
    if scales is not None:
        ids = torch.cat([ids, ids])
    length = model.condition_length + tokens.shape[1]
    mask = torch.arange(length, device=tokens.device)[None, None, None] <= fed
    if visible is not None:
        mask = mask & visible
    logits = model.head(model.transform(model.embed_tokens(ids, position - 1), fed, mask, layers)[:, -1])
    if scales is not None:
        logits = guide(logits, scales[position])
    drawn = draw_ids(logits, None if uniforms is None else uniforms[:, position].squeeze(1), options)
    tokens[:, position] = drawn[:, None]


class SessionSteps:
    """The steps of one sampling session, on a CUDA device captured in a graph at the first of them.

    Args:
        step: from ``compile_step``.
        cache: of the session, after its condition was fed.

    The others are as of ``sample_next``.
    """

    def __init__(
        self,
        step: CompiledStep,
        model: NextTokenModel,
        options: DecodingOptions,
        *,
        tokens: Tensor,
        uniforms: Tensor | None,
        scales: Tensor | None,
        visible: Tensor | None,
        cache: KVCache,
    ):
        self._offset = model.condition_length - 1
        self._position, self._fed = (torch.zeros(1, dtype=torch.int64, device=tokens.device) for _ in range(2))
        layers = [layer.at(self._fed) for layer in cache.layers]
        self._shifts = [layer.shift_memory for layer in cache.layers if layer.shift_memory is not None]
        inputs = (self._position, self._fed, tokens, uniforms, scales, visible, layers)
        self._run = partial(step, model, options, *inputs)
        self._captured = not tokens.is_cuda

    def __call__(self, position: int) -> None:
        """Feed the token before ``position``, the only one that the cache lacks, and draw the one there."""
        self._position.fill_(position)
        self._fed.fill_(position + self._offset)
        if not self._captured:
            self._capture()
        self._run()

    def _capture(self) -> None:
        """Replace the step by a CUDA graph of it. Running it ahead changes nothing but the token shift's memory: all
        else is written again by the step itself."""
        kept = [memory.clone() for memory in self._shifts]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compilation, and allocations that happen once
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        for memory, before in zip(self._shifts, kept, strict=True):
            memory.copy_(before)
        self._run, self._captured = graph.replay, True
