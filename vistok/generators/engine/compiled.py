"""Single-token decoding steps as compiled graphs of fixed shapes.

An eager step of a large transformer is several hundred small kernels, and on a GPU the host cannot launch them as fast
as they run. Compiled blocks are fewer kernels; captured in a CUDA graph, the whole step costs one launch per token.
On a GPU, attention skips the unused part of the cache, and products of a few rows are spread over all multiprocessors.
On a CPU there is nothing to gain: eager steps attend to the used part only, and multiply by packed weights
(``engine.packed``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vistok.generators.engine.cache import CachedLayers, KVCache
from vistok.generators.engine.contracts import NextTokenModel
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.generators.engine.split import split_layers
from vistok.guidance import weighted_sum
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.flex import FEWEST_CHANNELS, LiveKeys


@dataclass(frozen=True)
class SessionTensors:
    """What the compiled steps of a sampling session read and write in place.

    Attributes:
        tokens: (B, L) ids; written.
        uniforms: (B, L), or None for greedy decoding.
        weights: (L, rows), the weight of each guidance row at each position.
        failed: (1,), the first position whose logits were not finite; written.
        state: the output of the model's ``condition_state``.
        cache: of the session, after its condition was fed; written.
    """

    tokens: Tensor
    uniforms: Tensor | None
    weights: Tensor
    failed: Tensor
    state: tuple[Tensor, ...]
    cache: KVCache


class CompiledStep:
    """One sampling step of a model in three compiled parts: the embedding, one block, and the logits.

    All blocks share one compiled block, so a deep model compiles as fast as a shallow one. Ids are drawn uncompiled,
    since some versions of inductor fail on cumulative sums over large codebooks.

    Args:
        block_type: class of the model's blocks.
        backend: torch.compile's.
    """

    def __init__(self, block_type: type[nn.Module], backend: str):
        functions = embed_last, block_type.forward, next_logits
        self._before, self._block, self._after = (
            torch.compile(function, backend=backend, fullgraph=True, dynamic=False) for function in functions
        )

    def __call__(
        self,
        model: NextTokenModel,
        computing: NextTokenModel,
        options: DecodingOptions,
        session: SessionTensors,
        layers: CachedLayers,
        position: Tensor,
        fed: Tensor,
    ) -> None:
        """Feed the token before ``position`` and write the token drawn at ``position``.

        Args:
            computing: the result of ``with_blocks``, which runs the compiled blocks.
            layers: of the session's cache; they write at ``fed``.
            position: (1,) int64 image position, at least 1.
            fed: (1,) int64, the sequence position of the token before.
        """
        tokens, uniforms, failed = session.tokens, session.uniforms, session.failed
        keys, rows = seen_keys_for(tokens.device, model.blocks[0].attn.head_dim), session.weights.shape[1]
        x, mask = self._before(model, position, fed, tokens, session.cache.visible, keys, rows=rows)
        hidden = computing.transform(x, fed, mask, layers, *session.state)
        logits = self._after(model, hidden, position, session.weights)
        failed.copy_(torch.where(logits.sum().isfinite(), failed, torch.minimum(failed, position)))
        drawn = draw_ids(logits, None if uniforms is None else uniforms[:, position].squeeze(1), options)
        tokens[:, position] = drawn[:, None]

    def with_blocks(self, model: NextTokenModel, blocks: Sequence[nn.Module]) -> NextTokenModel:
        """A shallow copy of the model with these blocks, compiled. The model itself is not changed, since other threads
        may sample from it."""
        compiled = [copy.copy(block) for block in blocks]
        for shell, block in zip(compiled, blocks, strict=True):
            shell.forward = partial(self._block, block)
        like: Any = copy.copy(model)
        like._modules = like._modules | {"blocks": ModuleList(compiled)}
        return like


SeenKeys = Callable[[Tensor, int, Tensor | None], Mask]
"""Makes the attention mask of a query: (position (1,), cache length, visible bool (R or 1, 1, 1, length)) -> mask."""


def seen_keys_for(device: torch.device, head_dim: int) -> SeenKeys:
    """The mask function for the device: FlexAttention's on CUDA if heads are wide enough, else dense."""
    return LiveKeys.up_to if device.type == "cuda" and head_dim >= FEWEST_CHANNELS else dense_mask


def dense_mask(last: Tensor, length: int, visible: Tensor | None) -> Tensor:
    """Bool (R or 1, 1, 1, length), True for visible entries up to ``last``."""
    mask = torch.arange(length, device=last.device)[None, None, None] <= last
    return mask if visible is None else mask & visible


def blocks_for(model: NextTokenModel, rows: int, device: torch.device) -> list[nn.Module]:
    """The blocks, on a CUDA device with the layers of ``split_layers``."""
    if device.type != "cuda":
        return list(model.blocks)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return [split_layers(block, rows, processors) for block in model.blocks]


def embed_last(
    model: NextTokenModel,
    position: Tensor,
    fed: Tensor,
    tokens: Tensor,
    visible: Tensor | None,
    keys: SeenKeys,
    rows: int,
) -> tuple[Tensor, Mask]:
    """The embedded token before ``position``, (R, 1, D), and its attention mask over the whole cache."""
    ids = torch.cat([tokens[:, position - 1]] * rows)
    mask = keys(fed, model.condition_length + tokens.shape[1], visible)
    return model.embed_tokens(ids, (position - 1)[None], position[None]), mask


def next_logits(model: NextTokenModel, hidden: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """Guided logits (B, V) for ``position`` from hidden states (R, 1, D)."""
    return weighted_sum(model.entry_logits(hidden[:, -1:])[:, 0].chunk(weights.shape[1]), weights[position].squeeze(0))


class SessionSteps:
    """The steps of one sampling session. On a CUDA device, the second step captures the graph that it and all later
    steps replay.

    Args:
        step: the compiled step.
    """

    def __init__(self, step: CompiledStep, model: NextTokenModel, options: DecodingOptions, session: SessionTensors):
        limits = torch._dynamo.config  # of graphs per function; each thread has its own
        limits.recompile_limit = max(limits.recompile_limit, 64)  # a sweep over options takes more than 8
        self._offset = model.condition_length - 1
        device = session.tokens.device
        self._position, self._fed = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        layers = session.cache.at(self._fed)
        computing = step.with_blocks(model, blocks_for(model, session.weights.shape[1] * len(session.tokens), device))
        self._run = partial(step, model, computing, options, session, layers, self._position, self._fed)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._next: int | None = None  # the position that the graph's own counter is at

    def __call__(self, position: int) -> None:
        """Feed the token before ``position``, the only one that the cache lacks, and draw the token at ``position``."""
        if position != self._next:
            self._position.fill_(position)
            self._fed.fill_(position + self._offset)
        if not (self._warm and self._position.is_cuda):
            self._run()  # one-time work, such as compilation, cannot be captured
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        self._next = position + 1

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph that then advances the position by one."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
            self._position.add_(1)
            self._fed.add_(1)
        return graph
