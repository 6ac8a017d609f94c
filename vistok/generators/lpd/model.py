"""LPD: groups of tokens predicted at once, from position queries that see one another and all earlier groups.

Paper: Locality-aware Parallel Decoding for Efficient Autoregressive Image Generation (arXiv 2507.01957). Official
weights and conventions: github.com/mit-han-lab/lpd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.draws import Draws, Keys
from vistok.generators.engine.cache import CachedLayers, of_layers
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.queries import QueryGenerator
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.lpd import official
from vistok.generators.lpd.locality import locality_order
from vistok.generators.lpd.sampling import PUBLISHED, LPDOptions
from vistok.guidance import Guidance, Weights
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.rotary import Positions
from vistok.nn.vit import ViTBlock
from vistok.types import Condition, TokenSpec, as_dataclass

SIZES = {
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20},
    "XXL": {"dim": 1536, "num_layers": 48, "num_heads": 24},
}
RELEASED = (("L", 256), ("XL", 256), ("XXL", 256), ("L", 512), ("XL", 512))
NORM_EPS = 1e-6
STEP_SHARES = (1 / 32, 3 / 64, 1 / 16, 5 / 64, 3 / 32, 1 / 8, 1 / 4, 1 / 2, 1)
"""Numbers of steps in training, as shares of the number of tokens: 8, 12, 16, 20, 24, 32, 64, 128, 256 of 256."""


class LPD(QueryGenerator):
    """A transformer over [class, known tokens, queries]; each query predicts the token at its place.

    Tokens see the class, the earlier groups and their own group. Queries see the class, the tokens of earlier groups
    and the queries of their own group. In training each sample has a random order and a random number of steps.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        mlp_ratio: hidden width of the feed-forward, in units of dim.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 guidance is refused.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the outputs of attention and feed-forward, and of the feed-forward's hidden layer.

    Raises:
        ValueError: a spec without ids, or with several per position.
    """

    registry_name = "lpd"
    options_type = LPDOptions
    tiny = {"spec": TokenSpec(16, 32, dim=4, grid=(4, 4)), "num_classes": 5, "dim": 16, "num_layers": 2, "num_heads": 2}
    sizes = SIZES
    checkpoints = tuple(
        OfficialCheckpoint(
            f"mit-han-lab/lpd_{name.lower()}_{side}",
            f"lpd_{name.lower()}_{side}.pth",
            official.config(SIZES[name], side),
            tokenizer="FoundationVision/LlamaGen/vq_ds16_c2i.pt",
        )
        for name, side in RELEASED
    )
    kept_queries = 0

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        condition_dropout: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.1,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        if num_classes:
            self.class_embedding = nn.Embedding(num_classes, dim)
        self.null_class = nn.Parameter(torch.zeros(1, dim))
        self.token_embedding = nn.Embedding(self.spec.num_ids, dim)
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, self.spec.length + 1, dim))  # the first is that of the class
        self.input_norm = nn.LayerNorm(dim, NORM_EPS)
        self.blocks = ModuleList(
            ViTBlock(dim, num_heads, mlp_ratio=mlp_ratio, eps=NORM_EPS, attn_drop=attn_drop, proj_drop=proj_drop)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        self.output = nn.Linear(dim, self.spec.num_ids, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.null_class, self.query, self.positions):
            nn.init.normal_(parameter, std=0.02)

    @property
    def default_steps(self) -> int:
        """20 for 256 tokens, as published; in general 1.25 sqrt(L)."""
        return max(1, int(1.25 * self.spec.length**0.5))

    def scheduled_groups(self, num_steps: int) -> tuple[int, ...]:
        """The published group sizes if there are any, else those of ``cosine_groups``."""
        return PUBLISHED.get((self.spec.length, num_steps)) or super().scheduled_groups(num_steps)

    def _embed_class(self, condition: Condition) -> Tensor:
        """(R, 1, D)."""
        vectors = self.null_class.expand(len(condition), -1)
        if condition.labels is not None and self.num_classes:
            labels = condition.labels.masked_fill(condition.dropped, 0)
            vectors = torch.where(condition.dropped[:, None], vectors, self.class_embedding(labels))
        return self.input_norm(vectors + self.positions[:, 0])[:, None]

    def _embed_known(self, ids: Tensor, places: Tensor) -> Tensor:
        """(R, n, D) of ids (R, n)."""
        return self.input_norm(self.token_embedding(ids) + self.positions[0, 1 + places])

    def _embed_queries(self, places: Tensor) -> Tensor:
        """(1 or R, n, D) for places (1 or R, n)."""
        return self.input_norm(self.query + self.positions[0, 1 + places])

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        """(R, 1 + n, D): the class, and the queries of the first step."""
        queries = self._embed_queries(upcoming).expand(len(condition), -1, -1)
        return torch.cat([self._embed_class(condition), queries], 1)

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """(R, m + n, D): the tokens of one step, and the queries of the next."""
        queries = self._embed_queries(upcoming).expand(len(ids), -1, -1)
        return torch.cat([self._embed_known(ids, places), queries], 1)

    def entry_positions(self, known: Tensor | None, upcoming: Tensor) -> slice:
        """An empty slice: positions are part of the embeddings."""
        return slice(0)

    def step_mask(self, known: int, queries: int, start: int, device: torch.device) -> Tensor:
        """Tokens see everything except the queries; queries see everything."""
        mask = torch.ones(known + queries, start + known + queries, dtype=torch.bool, device=device)
        mask[:known, start + known :] = False
        return mask

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        for block, memory in zip(self.blocks, of_layers(kv_cache, len(self.blocks))):
            x = block(x, mask=mask, cache=memory)
        return x

    def predict(self, ids: Tensor, orders: Tensor, condition: Condition, draws: Draws) -> Tensor:
        groups = draws.get("groups")
        if groups is None:  # one token per group
            groups = torch.arange(ids.shape[1], device=ids.device)[None]
        # The last token is left out: it is in the last group, which no query sees.
        context = [self._embed_class(condition), self._embed_known(ids[:, :-1], orders[:, :-1])]
        x = torch.cat([*context, self._embed_queries(orders)], 1)  # (B, 2 L, D)
        return self.head(self.transform(x, slice(0), training_mask(groups), None)[:, ids.shape[1] :])

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; "order" (B, L), a random order of each sample; "groups" (B, L), the group number of
        each token in that order."""
        length = self.spec.length
        choices = sorted({max(1, round(share * length)) for share in STEP_SHARES})
        numbers = torch.stack([group_numbers(self.scheduled_groups(steps)) for steps in choices])
        chosen = (keys.uniform("groups") * len(choices)).long()
        return super().training_draws(keys) | {"groups": numbers[chosen]}

    def sampling_draws(self, keys: Keys, options: DecodingOptions | None = None) -> Draws:
        """ "ids" (B, L), a uniform number for each token; "order" (B, L), the order that the options name.

        Raises:
            ValueError: the order "locality" for tokens without a raster, or for group sizes that do not begin with 1.
        """
        options = options or LPDOptions()
        if not isinstance(options, LPDOptions):
            raise TypeError(f"the options of this generator are LPDOptions, got {type(options).__name__}")
        draws, grid = super().sampling_draws(keys, options), self.spec.grid
        is_raster = grid is not None and len(grid) == 2
        if options.order == "random" or (options.order is None and not is_raster):
            return draws
        if grid is None or len(grid) != 2:
            raise ValueError("the order 'locality' needs tokens on an image raster; take order='random'")
        sizes, length = self.group_sizes(options), self.spec.length
        if sizes[0] != 1:
            raise ValueError(
                f"the order 'locality' grows from one token, and the first group has {sizes[0]}; let group_sizes begin "
                "with 1, or take order='random'"
            )
        first = (keys.uniform("first") * length).long().clamp_max(length - 1)
        ties = keys.uniform("ties", len(sizes), length).numpy()
        orders = [
            locality_order(
                grid,
                sizes,
                place,
                rows,
                proximity_threshold=options.proximity_threshold,
                repulsion_threshold=options.repulsion_threshold,
            )
            for place, rows in zip(first.tolist(), ties, strict=True)
        ]
        return draws | {"order": torch.stack([torch.from_numpy(order) for order in orders])}

    def guidance_weights(self, guidance: Guidance, plan: Plan) -> list[Weights]:
        """(rows, 1, n, 1) for the n tokens of each step; the schedule is evaluated at every token."""
        length = self.spec.length
        weights = torch.tensor([guidance.weights(token, length) for token in range(length)], device=plan.order.device)
        return list(weights.T[:, None, :, None].split(plan.sizes, 2))

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(rename(state_dict, official.OFFICIAL_NAMES))


def group_numbers(sizes: tuple[int, ...]) -> Tensor:
    """(L,) int64: the group number of each token."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def training_mask(groups: Tensor) -> Tensor:
    """The attention mask of the entries [class, tokens but the last, queries], bool (B or 1, 1, 2 L, 2 L).

    Args:
        groups: (B or 1, L), the group number of each token, rising.
    """
    context = torch.cat([torch.full_like(groups[:, :1], -1), groups[:, :-1]], 1)  # the class comes before all groups
    context_sees = torch.cat(
        [context[:, None] <= context[:, :, None], torch.zeros_like(context[:, None] <= groups[:, :, None])], 2
    )
    queries_see = torch.cat([context[:, None] < groups[:, :, None], groups[:, None] == groups[:, :, None]], 2)
    return torch.cat([context_sees, queries_see], 1)[:, None]
