"""RAR: a plain next-token transformer whose training orders change from random to raster.

Paper: Randomized Autoregressive Visual Generation (arXiv 2411.00776). Official weights and conventions:
github.com/bytedance/1d-tokenizer (Apache-2.0). RobusTok (arXiv 2509.12474) generates with the same model.

Each token has two position embeddings: of its own place, and of the place to be predicted next. This allows any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.draws import Draws, Keys
from vistok.generators.engine.autoregressive import OrderedEntries
from vistok.generators.engine.cache import CachedLayers, of_layers
from vistok.generators.engine.orders import OrderedGenerator
from vistok.generators.engine.plan import in_order
from vistok.generators.rar import official
from vistok.generators.rar.networks import RARBlock
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.modulation import FinalModulation
from vistok.nn.rotary import Positions
from vistok.types import Condition, TokenSpec, as_dataclass

SIZES = {
    "B": {"dim": 768, "num_layers": 24, "num_heads": 16, "mlp_dim": 3072},
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096},
    "XL": {"dim": 1280, "num_layers": 32, "num_heads": 16, "mlp_dim": 5120},
    "XXL": {"dim": 1408, "num_layers": 40, "num_heads": 16, "mlp_dim": 6144},
}
SPARE_PLACES, SPARE_SLOTS = 1024, 100
"""Rows of the released tables beyond those of the tokens. Two rows of the place tables belong to the condition; the
others are unused."""


class RAR(OrderedGenerator):
    """A causal transformer over [start token, class, image tokens], modulated by the class.

    ``training_draws`` chooses an order for each training sequence: a random permutation with a probability that is 1
    until step ``random_until``, falls linearly, and is 0 from step ``raster_from`` on; else raster order. Sampling uses
    raster order.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        mlp_dim: hidden width of the feed-forward; None is 4 dim.
        random_until, raster_from: optimisation steps between which the share of random orders falls from 1 to 0.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 there is no null
            class, and guidance is refused.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the outputs of attention and feed-forward, and of the feed-forward's hidden layer.

    Raises:
        ValueError: a spec without ids, or with several per position; or random_until above raster_from.
    """

    registry_name = "rar"
    tiny = {"spec": TokenSpec(16, 32, dim=4, grid=(4, 4)), "num_classes": 5, "dim": 16, "num_layers": 2, "num_heads": 2}
    sizes = SIZES
    condition_length = 2
    checkpoints = (
        *(
            OfficialCheckpoint(
                "yucornetto/RAR",
                f"rar_{s.lower()}.bin",
                official.config(SIZES[s], 1024),
                tokenizer="fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin",
            )
            for s in SIZES
        ),
        *(
            OfficialCheckpoint(
                "qiuk6/RobusTok",
                f"rar_{s}.bin",
                official.config(SIZES[s.upper()], 4096),
                tokenizer="qiuk6/RobusTok/post-train.pt",
                licence="not stated",
            )
            for s in "bl"
        ),
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 768,
        num_layers: int = 24,
        num_heads: int = 16,
        mlp_dim: int | None = None,
        random_until: int = 125_000,
        raster_from: int = 187_500,
        condition_dropout: float = 0.1,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        if not 0 <= random_until <= raster_from:
            raise ValueError(
                f"random_until and raster_from must rise from 0, got {random_until} and {raster_from}: orders are "
                "random until the one, and raster from the other"
            )
        self.random_until, self.raster_from = random_until, raster_from
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        length = self.spec.length
        # Rows: the codes, an unused mask, the classes, the null class.
        self.class_rows_from = self.spec.num_ids + 1
        self.token_embedding = nn.Embedding(self.spec.num_ids + 1 + num_classes + 1, dim)
        self.start_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, length + SPARE_PLACES, dim))
        self.target_positions = nn.Parameter(torch.zeros(1, length + SPARE_PLACES, dim))
        self.slots = nn.Parameter(torch.zeros(1, length + SPARE_SLOTS, dim))
        self.blocks = ModuleList(
            RARBlock(dim, num_heads, mlp_dim or 4 * dim, attn_drop=attn_drop, proj_drop=proj_drop)
            for _ in range(num_layers)
        )
        self.norm = FinalModulation(dim)
        self.output = nn.Linear(dim, self.spec.num_ids)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.positions, self.target_positions, self.slots):
            nn.init.trunc_normal_(table, std=0.02)
        for module in (*self.blocks, self.norm):
            nn.init.zeros_(module.modulation[1].weight)

    def class_vector(self, condition: Condition) -> Tensor:
        """(R, D) embeddings of the condition, which modulate every position of a row."""
        return self.token_embedding(self.class_rows(condition))

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        return (self.class_vector(condition),)

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        """(R, 2, D): the start token, and the class with the target position of the first token."""
        start = (self.start_token + self.positions[:, :1]).expand(len(condition), -1, -1)
        target = self.target_positions[0, 2 + upcoming]  # (1 or R, 1, D)
        return torch.cat([start, self.class_vector(condition)[:, None] + self.positions[0, 1] + target], 1)

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """(R, n, D) of ids (R, n), with the target positions ``upcoming``; L stands for none, after the last token."""
        last = self.spec.length
        target = self.target_positions[0, (2 + upcoming).clamp_max(1 + last)]
        target = target * (upcoming < last)[..., None]  # the last token predicts nothing
        return self.token_embedding(ids) + self.positions[0, 2 + places] + target

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        (class_vector,) = state
        condition = class_vector[:, None] + self.slots[0, positions]  # (R, n, D)
        for block, memory in zip(self.blocks, of_layers(kv_cache, len(self.blocks))):
            x = block(x, condition, mask, memory)
        return self.norm(x, condition)

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden).float()

    def predict(self, ids: Tensor, orders: Tensor, condition: Condition, draws: Draws) -> Tensor:
        return self.logits_in_order(ids, orders, condition)[:, :-1]

    def logits_in_order(self, ids: Tensor, orders: Tensor, condition: Condition) -> Tensor:
        """Logits (B, L + 1, V) of ids (B, L) that are already in order; the last position predicts nothing."""
        upcoming = F.pad(orders[:, 1:], (0, 1), value=self.spec.length)
        x = torch.cat([self.embed_condition(condition, orders[:, :1]), self.embed_tokens(ids, orders, upcoming)], 1)
        hidden = self.transform(x, slice(0, x.shape[1]), None, None, self.class_vector(condition))
        return self.head(hidden[:, 1:])

    def ordered_entries(self, ids: Tensor, condition: Condition, draws: Draws) -> OrderedEntries:
        ids, orders = in_order(ids, draws.get("order"))
        tokens = self.embed_tokens(ids[:, :-1], orders[:, :-1], orders[:, 1:])
        x = torch.cat([self.embed_condition(condition, orders[:, :1]), tokens], 1)
        return OrderedEntries(x, slice(0, x.shape[1]), orders, slice(2, None), slice(1, None))

    def random_share(self, step: int) -> float:
        """The probability of a random order at optimisation step ``step``."""
        if step >= self.raster_from:
            return 0.0
        if step < self.random_until:  # before the division: the two steps may be equal
            return 1.0
        return 1 - (step - self.random_until) / (self.raster_from - self.random_until)

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; "order" (B, L), the raster positions of the tokens in the order of each sample."""
        random = keys.uniform("random_order") < self.random_share(keys.step)
        raster = torch.arange(self.spec.length, device=random.device).expand(len(keys), -1)
        order = torch.where(random[:, None], keys.permutation("order", self.spec.length), raster)
        return {"drop": keys.uniform("drop"), "order": order}

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(rename(state_dict, official.OFFICIAL_NAMES))
