"""The stage-2 transformer of ViT-VQGAN: a class-conditional raster-order GPT with a token shift.

Paper: Vector-quantized Image Modeling with Improved VQGAN (arXiv 2110.04627), where it is called VIM. Conventions:
github.com/thuanz123/enhancing-transformers (MIT). That implementation's cached sampler feeds the token shift zeros
instead of the previous token; here the shift has a memory, so sampling follows the trained distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import fuse, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.cache import CachedLayer, CachedLayers, of_layers
from vistok.nn.attention import Attention, Mask
from vistok.nn.containers import ModuleList
from vistok.nn.masks import prolonged, visible_causal_mask
from vistok.nn.mlp import MLP
from vistok.nn.rotary import Positions
from vistok.types import Condition, ConditionSpec, IdSpec, TokenSpec, as_dataclass


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


class GPTBlock(nn.Module):
    """Pre-norm block whose attention reads a learned mix of each position and the one before it (as in RWKV)."""

    def __init__(self, dim: int, num_heads: int, dropout: float, *, attn_bias: bool, mlp_bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mix = nn.Parameter(torch.linspace(0, 1, dim).view(1, 1, dim))
        self.attn = Attention(
            dim, num_heads, qkv_bias=attn_bias, out_bias=attn_bias, attn_drop=dropout, proj_drop=dropout
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, squared_relu, bias=mlp_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: CachedLayer | None) -> Tensor:
        y = self.norm1(x)
        previous = F.pad(y[:, :-1], (0, 0, 1, 0)) if cache is None else cache.shift(y)
        y = y * self.mix + previous * (1 - self.mix)
        x = x + self.attn(y, mask=mask, causal=mask is None, cache=cache)
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViTVQGANGPT(AutoregressiveGenerator):
    """GPT over image tokens after ``condition_length`` condition tokens, which attend to each other bidirectionally.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: vocabulary of the condition; 0 for unconditional generation.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        dropout: of the attention weights, the attention output and the feed-forward, in training (paper: 0.1).
        condition_dropout: share of training samples whose class is replaced by a null class, for guidance. The paper
            and the reference have none: with 0 there is no null class, and guidance is refused.
        condition_length: number of condition tokens; labels give one.
        attn_bias, mlp_bias: whether the linear layers of attention and feed-forward have biases.
    """

    registry_name = "vit_vqgan_gpt"
    tiny = {
        "spec": TokenSpec(16, 32, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "condition_dropout": 0.1,
    }
    sizes = {
        "base": {"dim": 1536, "num_layers": 24, "num_heads": 16},
        "large": {"dim": 2048, "num_layers": 36, "num_heads": 16},
    }

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 1536,
        num_layers: int = 24,
        num_heads: int = 16,
        dropout: float = 0.0,
        condition_dropout: float = 0.0,
        condition_length: int = 1,
        attn_bias: bool = True,
        mlp_bias: bool = True,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        self.num_classes = num_classes or None
        self.condition_dropout, self.condition_length = condition_dropout, condition_length
        self.condition_embedding = nn.Embedding(num_classes + self.has_null, dim)
        self.condition_positions = nn.Parameter(torch.zeros(1, condition_length, dim))
        self.token_embedding = nn.Embedding(self.spec.num_ids, dim)
        self.token_positions = nn.Parameter(torch.zeros(1, self.spec.length, dim))
        bias = {"attn_bias": attn_bias, "mlp_bias": mlp_bias}
        self.blocks = ModuleList(GPTBlock(dim, num_heads, dropout, **bias) for _ in range(num_layers))
        self.shift_dim = dim
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, self.spec.num_ids, bias=False)
        self.apply(_initialise)

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        """Arguments for class labels, or for condition ids, whose vocabulary is passed as ``num_classes``."""
        cls.refuse_parts(spec, "ids" if spec.ids else "labels")
        if spec.ids is None:
            return super().condition_arguments(spec)
        return {"num_classes": spec.ids.vocabulary_size, "condition_length": spec.ids.length}

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        return self.condition_embedding(self._condition_ids(condition)) + self.condition_positions

    def _condition_ids(self, condition: Condition) -> Tensor:
        """Condition tokens (R, T), the null id in dropped rows."""
        given = condition.ids if condition.labels is None else condition.labels[:, None]
        if given is not None and not self.has_null:
            return given
        null = torch.full(
            (len(condition), self.condition_length), self.num_classes or 0, device=condition.dropped.device
        )
        return null if given is None else torch.where(condition.dropped[:, None], null, given)

    @property
    def condition_spec(self) -> ConditionSpec:
        """A class label or condition ids. A label is one token, so only a model of one condition token takes labels."""
        if self.num_classes is None:
            return ConditionSpec()
        labels = self.num_classes if self.condition_length == 1 else 0
        return ConditionSpec(num_classes=labels, ids=IdSpec(self.num_classes, self.condition_length))

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.token_positions[0, places]

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """Causal, except that condition tokens all see each other; padding is hidden. None if plain causal."""
        ids = condition.part("ids")
        padding = None if ids is None else ids.mask
        if padding is None and (self.condition_length == 1 or start >= self.condition_length):
            return None
        if padding is None:
            padding = torch.ones(1, stop, dtype=torch.bool, device=self.token_positions.device)
        return visible_causal_mask(prolonged(padding, stop), start, prefix=self.condition_length)

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        for block, memory in zip(self.blocks, of_layers(kv_cache, len(self.blocks))):
            x = block(x, mask, memory)
        return x

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, {})
        dim = given.take("embed_dim")
        model = cls(
            TokenSpec(given.take("img_num_tokens"), given.take("vocab_img_size"), dim=dim),
            num_classes=given.take("vocab_cond_size"),
            dim=dim,
            num_layers=given.take("n_layers"),
            num_heads=given.take("n_heads"),
            condition_length=given.take("cond_num_tokens"),
            attn_bias=given.take("attn_bias", True),
            mlp_bias=given.take("mlp_bias", True),
        )
        given.finish()
        fused = fuse(state_dict, ("attn.query", "attn.key", "attn.value"), "attn.qkv")
        return model.with_official_weights(rename(fused, OFFICIAL_NAMES))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the transformer out of a stage-2 training checkpoint, which also holds the tokenizer."""
        own = {key: value for key, value in state.items() if not key.startswith("stage1_model.")}
        return {key.removeprefix("transformer."): value for key, value in own.items()}


OFFICIAL_NAMES = [
    (r"tok_emb_cond\.weight", r"condition_embedding.weight"),
    (r"tok_emb_code\.weight", r"token_embedding.weight"),
    (r"pos_emb_cond", r"condition_positions"),
    (r"pos_emb_code", r"token_positions"),
    (r"blocks\.(\d+)\.ln([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.time_mix", r"blocks.\1.mix"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.mlp\.p0\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.p1\.(\w+)", r"blocks.\1.mlp.down.\2"),
    (r"layer_norm\.(\w+)", r"norm.\1"),
    (r"head\.weight", r"output.weight"),
]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
