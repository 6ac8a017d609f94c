"""The transformers of GigaTok (arXiv 2504.08736) between the convolutional stacks and the codes.

For layout "1d" a Q-Former turns a feature map into a sequence of tokens and back: queries attend to each other and to
the map. For layout "2d" a plain vision transformer refines the map. Positions are learned, for one raster only.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.alignment import AlignmentConfig, AlignmentHead
from vistok.nn.attention import attend
from vistok.nn.containers import ModuleList
from vistok.nn.initialisation import truncated_normal
from vistok.nn.mlp import MLP
from vistok.nn.vit import TransformerSize

LayerKind = Literal["self_attention", "cross_attention"]
QueryInit = Literal["pooled", "mean"]


class Decoded(NamedTuple):
    """A feature map (B, C, h, w), and the output (B, h * w, channels of the frozen encoder) of the alignment head."""

    spatial: Tensor
    aligned: Tensor | None


class PositionedAttention(nn.Module):
    """Multi-head attention of queries (B, N, D) to keys and values (B, M, D), given separately: DETR (arXiv 2005.12872)
    adds positions to queries and keys, but not to values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.num_heads)
            for project, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.out(attend(q, k, v))


class SelfAttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = PositionedAttention(dim, num_heads)
        self.mlp = MLP(dim, 4 * dim, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y)
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """DETR's pre-norm decoder layer: self-attention of x (B, N, D), cross-attention to a memory (B, M, D), and an MLP.

    The memory is not normalised. Positions are added to queries and keys in every layer.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn, self.cross_attn = (PositionedAttention(dim, num_heads) for _ in range(2))
        self.mlp = MLP(dim, 4 * dim, F.gelu)

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor, memory_positions: Tensor) -> Tensor:
        """``positions`` are (N, D), ``memory_positions`` (M, D)."""
        y = self.norm1(x)
        x = x + self.self_attn(y + positions, y + positions, y)
        x = x + self.cross_attn(self.norm2(x) + positions, memory + memory_positions, memory)
        return x + self.mlp(self.norm3(x))


def pool_levels(features: Tensor, num_tokens: int) -> Tensor:
    """Averages of a map over ever finer blocks, (B, C, h, w) -> (B, num_tokens, C).

    There are groups of 1, 1, 2, 4, ..., num_tokens / 2 blocks. Each group covers the map, in raster order. The first
    two tokens are the mean of the map. Each further group halves the blocks, by columns and rows in turn, columns
    first.

    Raises:
        ValueError: num_tokens is no power of two, or the blocks do not divide the map.
    """
    if num_tokens < 1 or num_tokens & (num_tokens - 1):
        raise ValueError(f"pooled queries come in powers of two, got num_tokens {num_tokens}")
    h, w = features.shape[2:]
    groups = []
    for group in range(num_tokens.bit_length()):
        level = max(group - 1, 0)
        rows, columns = 2 ** (level // 2), 2 ** ((level + 1) // 2)
        if h % rows or w % columns:
            raise ValueError(
                f"{num_tokens} pooled queries need a map whose sides {rows} x {columns} blocks divide; it is {h} x {w}"
            )
        blocks = rearrange(features, "b c (r y) (k x) -> b (r k) c (y x)", r=rows, k=columns)
        groups.append(blocks.mean(-1))
    return torch.cat(groups, 1)


class TransformerLayers(nn.Module):
    """The layers of one transformer over (B, N, D).

    Args:
        size: of the transformer.
        kind: "self_attention"; or "cross_attention", to a memory or, without one, to the layer's input.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, size: TransformerSize, kind: LayerKind):
        super().__init__()
        if kind not in LAYERS:
            raise ValueError(f"layer_kind must be one of {', '.join(map(repr, LAYERS))}, got {kind!r}")
        self.kind = kind
        self.layers = ModuleList(LAYERS[kind](size.dim, size.num_heads) for _ in range(size.num_layers))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        memory: Tensor | None = None,
        memory_positions: Tensor | None = None,
        *,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs of the last layer and of layer ``tap`` (counted from 1), both (B, N, D); the second is None
        without ``tap``."""
        # Under autocast the inputs have its dtype, but residual stream and memory are to keep that of the weights.
        dtype, tapped = next(self.parameters()).dtype, None
        x, memory = x.to(dtype), None if memory is None else memory.to(dtype)
        for number, layer in enumerate(self.layers, 1):
            if self.kind == "self_attention":
                x = layer(x)
            elif memory is None:
                x = layer(x, x, positions, positions)
            else:
                x = layer(x, memory, positions, memory_positions)
            if number == tap:
                tapped = x
        return x, tapped


class _Encoder(nn.Module):
    """Base of both encoders: embeds a map (B, C, h, w) in raster order, and projects features to C channels."""

    def __init__(self, channels: int, grid: tuple[int, int], size: TransformerSize, kind: LayerKind):
        super().__init__()
        self.grid = grid
        self.norm_in, self.embed = nn.LayerNorm(channels), nn.Linear(channels, size.dim)
        self.positions = learned_positions(math.prod(grid), size.dim)
        self.transformer = TransformerLayers(size, kind)
        self.norm_out, self.out = nn.LayerNorm(size.dim), nn.Linear(size.dim, channels)

    def embed_map(self, spatial: Tensor) -> Tensor:
        """(B, C, h, w) to (B, h * w, D), without positions."""
        return self.embed(self.norm_in(rearrange(spatial, "b c h w -> b (h w) c")))

    @abstractmethod
    def features(self, spatial: Tensor) -> Tensor:
        """A map (B, C, h, w) to features of the tokens (B, N, D)."""

    def forward(self, spatial: Tensor) -> Tensor:
        """A map (B, C, h, w) to tokens (B, N, C)."""
        return self.out(self.features(spatial))


class QueryEncoder(_Encoder):
    """A map (B, C, h, w) to a sequence of N tokens (B, N, C), by queries that attend to the map.

    Args:
        channels: C.
        grid: (h, w).
        num_tokens: N.
        size: of the transformer.
        query_init: initial queries: "pooled", averages over ever finer blocks of the map, or its "mean".

    Raises:
        ValueError: an unknown ``query_init``, or blocks that do not divide the map.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int], num_tokens: int, size: TransformerSize, query_init: QueryInit
    ):
        super().__init__(channels, grid, size, "cross_attention")
        if query_init == "pooled":
            pool_levels(torch.empty(1, 1, *grid, device="meta"), num_tokens)  # refuses numbers that do not fit
        elif query_init != "mean":
            raise ValueError(f"query_init must be 'pooled' or 'mean', got {query_init!r}")
        self.num_tokens, self.query_init = num_tokens, query_init
        self.token_positions = learned_positions(num_tokens, size.dim)
        self.query_proj = nn.Linear(size.dim, size.dim)
        self.apply(initialise)

    def features(self, spatial: Tensor) -> Tensor:
        """A map (B, C, h, w) to the normalised output of the last layer, (B, N, D)."""
        memory = self.embed_map(spatial)
        x, _ = self.transformer(self.query_proj(self._pooled(memory)), self.token_positions, memory, self.positions)
        return self.norm_out(x)

    def _pooled(self, memory: Tensor) -> Tensor:
        """Initial queries (B, N, D) from an embedded map (B, h * w, D)."""
        if self.query_init == "mean":
            return memory.mean(1, keepdim=True).expand(-1, self.num_tokens, -1)
        return pool_levels(rearrange(memory, "b (h w) d -> b d h w", h=self.grid[0]), self.num_tokens)


class GridEncoder(_Encoder):
    """A map (B, C, h, w) to a raster of tokens (B, h * w, C)."""

    def __init__(self, channels: int, grid: tuple[int, int], size: TransformerSize, kind: LayerKind):
        super().__init__(channels, grid, size, kind)
        self.apply(initialise)

    def features(self, spatial: Tensor) -> Tensor:
        """A map (B, C, h, w) to the normalised output of the last layer, (B, h * w, D)."""
        x, _ = self.transformer(self.embed_map(spatial) + self.positions, self.positions)
        return self.norm_out(x)


class _Decoder(nn.Module):
    """Base of both decoders: embeds tokens (B, N, C), and projects features to a map (B, C, h, w).

    Raises:
        ValueError: the layer to align does not exist.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        size: TransformerSize,
        kind: LayerKind,
        alignment: AlignmentConfig | None,
    ):
        super().__init__()
        self.grid, self.tap = grid, None if alignment is None else alignment.tap(range(1, size.num_layers + 1))
        self.norm_in, self.embed = nn.LayerNorm(channels), nn.Linear(channels, size.dim)
        self.positions = learned_positions(math.prod(grid), size.dim)
        self.transformer = TransformerLayers(size, kind)
        self.norm_out, self.out = nn.LayerNorm(size.dim), nn.Conv2d(size.dim, channels, 3, padding=1)
        self.alignment_head = None if alignment is None else AlignmentHead.of(size.dim, alignment)

    def forward(self, tokens: Tensor) -> Decoded:
        """Tokens (B, N, C) to a map, and aligned features if there is a head."""
        spatial, tapped = self._run(tokens)
        head = self.alignment_head
        return Decoded(spatial, None if tapped is None or head is None else head(tapped))

    def decode_map(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) to a map (B, C, h, w), without the head."""
        return self._run(tokens)[0]

    @abstractmethod
    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens (B, N, D) to features of the map (B, h * w, D), and those of the tapped layer."""

    def _run(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        x, tapped = self.features(self.embed(self.norm_in(tokens)))
        return self.out(rearrange(self.norm_out(x), "b (h w) d -> b d h w", h=self.grid[0])), tapped


class QueryDecoder(_Decoder):
    """A sequence (B, N, C) to a map (B, C, h, w): a query per cell of the map attends to the sequence.

    Args:
        channels: C.
        grid: (h, w).
        num_tokens: N.
        size: of the transformer.
        alignment: config of the alignment head; None has no head.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        num_tokens: int,
        size: TransformerSize,
        alignment: AlignmentConfig | None,
    ):
        super().__init__(channels, grid, size, "cross_attention", alignment)
        self.token_positions = learned_positions(num_tokens, size.dim)
        self.apply(initialise)

    def features(self, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens (B, N, D) to the last and the tapped layer's output, (B, h * w, D)."""
        queries = memory[:, :1].expand(-1, len(self.positions), -1)  # from the first token, whose query was the mean
        return self.transformer(queries, self.positions, memory, self.token_positions, tap=self.tap)


class GridDecoder(_Decoder):
    """A raster of tokens (B, h * w, C) to a map (B, C, h, w)."""

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        size: TransformerSize,
        kind: LayerKind,
        alignment: AlignmentConfig | None,
    ):
        super().__init__(channels, grid, size, kind, alignment)
        self.apply(initialise)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens (B, h * w, D) to the last and the tapped layer's output, of the same shape."""
        return self.transformer(x + self.positions, self.positions, tap=self.tap)


LAYERS = {"self_attention": SelfAttentionBlock, "cross_attention": CrossAttentionBlock}


def learned_positions(count: int, dim: int) -> nn.Parameter:
    """A learned table (count, dim) with initial standard deviation dim ** -0.5."""
    return nn.Parameter(torch.randn(count, dim) * dim**-0.5)


def initialise(module: nn.Module) -> None:
    """Truncated normal weights, zero biases; for ``nn.Module.apply``."""
    if isinstance(module, PositionedAttention):
        # Xavier-uniform for the three projections as one matrix (3 D, D).
        bound = math.sqrt(6 / (4 * module.q.in_features))
        for projection in (module.q, module.k, module.v):
            nn.init.uniform_(projection.weight, -bound, bound)
    else:
        truncated_normal(module)
