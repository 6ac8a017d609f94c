"""RandAR: next-token prediction in random orders; an instruction token names the place of each next token.

Paper: RandAR: Decoder-only Autoregressive Visual Generation in Random Orders (arXiv 2412.01827). Official weights and
conventions: github.com/ziqipang/RandAR (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.draws import Draws, Keys
from vistok.generators.engine.autoregressive import OrderedEntries
from vistok.generators.engine.cache import CachedLayers, of_layers
from vistok.generators.engine.plan import in_order
from vistok.generators.engine.queries import QueryGenerator
from vistok.generators.llama import LlamaBlock, position_table
from vistok.generators.randar import official
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.mlp import rounded_hidden_dim
from vistok.nn.norms import RMSNorm
from vistok.nn.rotary import FixedRotation, Positions, rotate
from vistok.types import Condition, TokenSpec, as_dataclass

SIZES = {
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20},
}
TOKENIZERS = {
    16384: "FoundationVision/LlamaGen/vq_ds16_c2i.pt",
    1024: "fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin",
}
"""The tokenizers that the released models were trained with, by their number of codes."""
RELEASED = {"0.3b_llamagen": ("L", 16384), "0.3b_maskgit": ("L", 1024), "0.7b_llamagen": ("XL", 16384)}
OrderKind = Literal["random", "raster"]
PlaceKind = Literal["rope2d", "rope1d"]


class RandAR(QueryGenerator):
    """A causal transformer over [class, P, x, P, x, ...]: before each token x the instruction P for its place.

    An instruction is one learned vector, rotated in every head by the angles of the place. In attention, tokens and
    instructions are rotated again, both by the token's place; with "rope2d", queries and keys of the class are zero
    (see ``llama.position_table``). Parallel decoding appends the instructions of several tokens; once the tokens are
    known, the cache is rewritten in the order of training.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        num_kv_heads: number of key and value heads, a divisor of num_heads; None is num_heads.
        multiple_of: the feed-forward width, 8/3 of dim, is rounded up to a multiple of this.
        position_order: training orders, "random" or "raster".
        positions: "rope2d" rotates by row and column; "rope1d" by the number of the token, for tokens without a raster.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 there is no null
            class, and guidance is refused.
        token_drop, attn_drop, proj_drop, ffn_drop: dropout of the embedded image tokens, the attention weights, the
            attention output and the feed-forward output, in training.
        rope_base: base of the rotary frequencies.
        norm_eps: eps of the RMS norms.

    Raises:
        ValueError: a spec without ids, with several per position, or without a raster for "rope2d"; or an
            unknown order or kind of positions.
    """

    registry_name = "randar"
    plain_sequence = {"positions": "rope1d"}
    tiny = {
        "spec": TokenSpec(16, 32, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "multiple_of": 16,
    }
    sizes = SIZES
    checkpoints = tuple(
        OfficialCheckpoint(
            "ziqipang/RandAR",
            f"randar_{name}_360k_bs_1024_lr_0.0004.safetensors",
            official.config(SIZES[size], codebook_size),
            tokenizer=TOKENIZERS[codebook_size],
        )
        for name, (size, codebook_size) in RELEASED.items()
    )
    kept_queries = 1
    only_next = ""

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        multiple_of: int = 256,
        position_order: OrderKind = "random",
        positions: PlaceKind = "rope2d",
        condition_dropout: float = 0.1,
        token_drop: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.1,
        ffn_drop: float = 0.1,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        if position_order not in get_args(OrderKind):
            raise ValueError(f"position_order must be 'random' or 'raster', got {position_order!r}")
        if positions not in get_args(PlaceKind):
            raise ValueError(f"positions must be 'rope2d' or 'rope1d', got {positions!r}")
        self.position_order, self.condition_dropout = position_order, condition_dropout
        self.num_classes, self.num_heads, self.rope_base = num_classes or None, num_heads, rope_base
        self.position_kind = positions
        self.class_embedding = nn.Embedding(num_classes + self.has_null, dim)
        self.token_embedding = nn.Embedding(self.spec.num_ids, dim)
        self.position_instruction = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.dropout = nn.Dropout(token_drop)
        self.blocks = ModuleList(
            LlamaBlock(
                dim,
                num_heads,
                rounded_hidden_dim(dim, multiple_of),
                num_kv_heads=num_kv_heads,
                eps=norm_eps,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                ffn_drop=ffn_drop,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, self.spec.num_ids, bias=False)
        self.rotation = FixedRotation(position_table(self.spec, 1, dim // num_heads, positions, rope_base))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    @property
    def num_entries(self) -> int:
        """The class, and an instruction and a token per place."""
        return 1 + 2 * self.spec.length

    @property
    def default_steps(self) -> int:
        """88 for 256 tokens, as published, and in proportion for others."""
        return max(1, round(88 / 256 * self.spec.length))

    def instructions(self, places: Tensor) -> Tensor:
        """The instruction tokens (R, n, D) for places (R, n)."""
        vector = self.position_instruction.view(1, self.num_heads, 1, -1)  # (1, H, 1, h)
        return rotate(vector, self.rotation(1 + places)).transpose(1, 2).flatten(2)  # (R, H, n, h) to (R, n, D)

    def _embed_class(self, condition: Condition) -> Tensor:
        """(R, 1, D)."""
        return self.class_embedding(self.class_rows(condition))[:, None]

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        """(R, 1 + n, D): the class, and the instructions of the first step."""
        queries = self.instructions(upcoming).expand(len(condition), -1, -1)
        return torch.cat([self._embed_class(condition), queries], 1)

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """(R, 2 m - 1 + n, D): x, P, x, ..., P, x of one step, whose first P is cached, and the instructions of the
        next."""
        queries = self.instructions(upcoming).expand(len(ids), -1, -1)
        return torch.cat([self._embed_pairs(ids, places)[:, 1:], queries], 1)

    def _embed_pairs(self, ids: Tensor, places: Tensor) -> Tensor:
        """P, x, P, x, ...: (R, 2 m, D) of ids (R, m)."""
        tokens = self.dropout(self.token_embedding(ids))
        return torch.stack([self.instructions(places).expand_as(tokens), tokens], 2).flatten(1, 2)

    def entry_positions(self, known: Tensor | None, upcoming: Tensor) -> Tensor:
        """Rows of the rotation table: 0 for the class, 1 + place for all others."""
        before = upcoming.new_full((len(upcoming), 1), -1) if known is None else known.repeat_interleave(2, 1)[:, 1:]
        return 1 + torch.cat([before, upcoming], 1)

    def step_mask(self, known: int, queries: int, start: int, device: torch.device) -> Tensor | None:
        """Causal, also among the queries."""
        stop = known + queries
        return None if start == 0 else torch.ones(stop, start + stop, dtype=torch.bool, device=device).tril(start)

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        rotation = self.rotation(positions)
        for block, memory in zip(self.blocks, of_layers(kv_cache, len(self.blocks))):
            x = block(x, rotation, mask, memory)
        return x

    def predict(self, ids: Tensor, orders: Tensor, condition: Condition, draws: Draws) -> Tensor:
        entries = self._entries(ids, orders, condition)
        return self.head(self.transform(entries.x, entries.positions, None, None)[:, entries.states])

    def _entries(self, ids: Tensor, orders: Tensor, condition: Condition) -> OrderedEntries:
        # The last token is left out: it predicts nothing.
        x = torch.cat([self._embed_class(condition), self._embed_pairs(ids, orders)[:, :-1]], 1)  # (B, 2 L, D)
        positions = torch.cat([torch.zeros_like(orders[:, :1]), 1 + orders.repeat_interleave(2, 1)[:, :-1]], 1)
        return OrderedEntries(x, positions, orders, slice(2, None, 2), slice(1, None, 2))

    def ordered_entries(self, ids: Tensor, condition: Condition, draws: Draws) -> OrderedEntries:
        return self._entries(*in_order(ids, draws.get("order")), condition)

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; "order" (B, L), the places of the tokens in each sample's order."""
        draws = super().training_draws(keys)
        if self.position_order == "raster":
            draws["order"] = torch.arange(self.spec.length).expand(len(keys), -1)
        return draws

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(rename(state_dict, official.OFFICIAL_NAMES))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the sampling cache of a model that has generated."""
        return {key: tensor for key, tensor in state.items() if ".attention.kv_cache." not in key}
