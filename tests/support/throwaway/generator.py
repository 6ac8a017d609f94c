"""A generator of 1, then 4, then 9 tokens at places drawn for each sample, from a class and a text.

A pass feeds the tokens of a step and a query for each token of the next one; its entries see one another. Guidance has
three rows: class and text, the class alone, nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.conditions import PARTS
from vistok.draws import Draws, Keys
from vistok.generators.base import weighted_mean
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.cache import CachedLayers
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions
from vistok.guidance import Guidance, constant
from vistok.nn.attention import Attention
from vistok.types import Clock, Condition, ConditionSpec, Expands, GeneratorOutput, IdSpec, TokenSpec, as_dataclass

SIZES = (1, 4, 9)


@dataclass(frozen=True)
class ScatteredOptions(DecodingOptions):
    """``guidance_scale`` guides class and text against no condition, unless the text has its own scale."""

    text_scale: float | None = None

    @property
    def guidance(self) -> Guidance:
        if self.text_scale is None:
            return super().guidance
        return Guidance(((), ("ids",), PARTS), (constant(self.text_scale), constant(self.guidance_scale)))


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, 2)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        x = x + self.attn(self.norm(x), mask=mask, cache=cache)
        return x + self.mlp(x)


class Scattered(AutoregressiveGenerator):
    registry_name = "scattered"
    options_type = ScatteredOptions
    tiny = {"spec": TokenSpec(14, 11, dim=4), "num_classes": 3, "text_vocabulary": 5, "text_length": 2}

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 0,
        text_vocabulary: int = 0,
        text_length: int = 0,
        dim: int = 16,
        num_layers: int = 2,
        condition_dropout: float = 0.2,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), "Scattered")
        if self.spec.length != sum(SIZES):
            raise ValueError(f"Scattered generates {sum(SIZES)} tokens, but the tokenizer makes {self.spec.length}")
        self.num_classes, self._text = num_classes, IdSpec(text_vocabulary, text_length) if text_length else None
        self.condition_length, self.condition_dropout = 2 + text_length, condition_dropout
        vocabulary, places = self.spec.codebook_size, self.spec.length
        self.class_embedding, self.text = nn.Embedding(num_classes + 1, dim), nn.Embedding(text_vocabulary + 1, dim)
        self.tokens, self.places, self.queries = (nn.Embedding(n, dim) for n in (vocabulary, places, places))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(num_layers))
        self.norm, self.output = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        cls.refuse_parts(spec, "labels", "ids")
        text = {} if spec.ids is None else {"text_vocabulary": spec.ids.vocabulary_size, "text_length": spec.ids.length}
        return {"num_classes": spec.num_classes, **text}

    @property
    def condition_spec(self) -> ConditionSpec:
        return ConditionSpec(num_classes=self.num_classes, ids=self._text)

    @property
    def num_entries(self) -> int:
        return self.condition_length + sum(SIZES[:-1]) + sum(SIZES[1:])

    def training_draws(self, keys: Keys) -> Draws:
        return super().training_draws(keys) | {"order": keys.permutation("order", self.spec.length)}

    def sampling_draws(self, keys: Keys, options: ScatteredOptions | None = None) -> Draws:
        return super().sampling_draws(keys, options) | {"order": keys.permutation("order", self.spec.length)}

    def plan(self, draws: Draws) -> Plan:
        return Plan(draws["order"], SIZES)

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        labels, dropped = condition.labels, condition.dropped_of("labels")
        ids = torch.zeros_like(dropped, dtype=torch.int64) if labels is None else labels
        return (self.class_embedding(ids.masked_fill(dropped, self.num_classes))[:, None],)

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        part, null = condition.part("ids"), self.text.num_embeddings - 1
        ids = torch.full((len(condition), self.condition_length - 2), null, device=upcoming.device)
        if part is not None:
            ids = torch.where(part.valid() & ~part.dropped[:, None], part.values, null)
        queries = self.queries(upcoming).expand(len(ids), -1, -1)
        return torch.cat([*self.condition_state(condition), self.text(ids), queries], 1)

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        queries = self.queries(upcoming).expand(len(ids), -1, -1)
        return torch.cat([self.tokens(ids) + self.places(places), queries], 1)

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        return None if start == 0 else self.output.weight.new_ones(1, 1, stop - start, stop, dtype=torch.bool)

    def transform(
        self, x: Tensor, positions: Any, mask: Tensor | None, kv_cache: CachedLayers | None, state: Tensor
    ) -> Any:
        for block, memory in zip(self.blocks, kv_cache or [None] * len(self.blocks)):
            x = block(x + state, mask, memory)
        return x

    def whole(self, ids: Tensor, order: Tensor, condition: Condition) -> Tensor:
        """Logits (B, 14, V) in one pass over ids (B, 14) in order, under a mask of blocks."""
        parts = [*zip(ids.split(SIZES, 1), order.split(SIZES, 1), order.split(SIZES, 1)[1:])]
        x = [self.embed_condition(condition, order[:, :1]), *(self.embed_tokens(*part) for part in parts)]
        block = torch.repeat_interleave(torch.arange(3), torch.tensor([part.shape[1] for part in x])).to(ids.device)
        mask = block[:, None] >= block
        hidden = self.transform(torch.cat(x, 1), None, mask, None, *self.condition_state(condition))
        passes = hidden.split([part.shape[1] for part in x], 1)
        return torch.cat([self.head(one[:, -n:]) for one, n in zip(passes, SIZES)], 1)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        clock: Clock | None = None,
        tokenizer: Expands | None = None,
    ) -> GeneratorOutput:
        """Of the samples whose condition is dropped, half lose only the text."""
        self.check_tokenizer(tokenizer)
        if draws and "drop" in draws:
            drop = draws["drop"]
            condition = condition.without(("ids",), drop < self.condition_dropout)
            condition = condition.drop(drop < self.condition_dropout / 2)
        order = draws["order"]
        ids = tokens.gather(1, order)
        logits = self.whole(ids, order, condition)
        per_sample = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)
        loss = per_sample.mean() if weights is None else weighted_mean(per_sample, weights)
        return GeneratorOutput(loss, logits)
