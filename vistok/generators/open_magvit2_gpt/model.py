"""Open-MAGVIT2's generator: Llama over large codebooks, whose ids are predicted in sub-tokens of fewer bits.

Paper: Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual Generation (arXiv 2409.04410),
section 3.2. Official weights and conventions: github.com/TencentARC/SEED-Voken (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.checkpoints.weights import second_stage
from vistok.draws import Draws
from vistok.generators.base import weighted_mean
from vistok.generators.engine.sampling import inverse_cdf_ids
from vistok.generators.llama import Llama
from vistok.generators.open_magvit2_gpt import official
from vistok.generators.open_magvit2_gpt.sampling import SubTokenOptions
from vistok.generators.open_magvit2_gpt.sub_tokens import SubTokens
from vistok.nn.containers import ModuleList
from vistok.nn.mlp import rounded_hidden_dim
from vistok.types import Clock, Condition, ConditionSpec, Expands, GeneratorOutput, TokenSpec, as_dataclass

SIZES = {
    "B": {"dim": 1024, "num_layers": 24, "num_intra_layers": 2, "num_heads": 16},
    "L": {"dim": 1280, "num_layers": 36, "num_intra_layers": 3, "num_heads": 20},
    "XL": {"dim": 1536, "num_layers": 48, "num_intra_layers": 4, "num_heads": 24},
}


class OpenMAGVIT2GPT(Llama):
    """A causal transformer over [class, image tokens], and a small one over the sub-tokens of each image token.

    The large one reads the sum of a token's sub-token embeddings. The small one reads the large one's hidden state of a
    position, followed by the embeddings of the sub-tokens drawn so far. It has a head for each sub-token.

    Args:
        spec: the tokens to model: one id per position.
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_heads: width and heads of both transformers; heads divide dim.
        num_layers, num_intra_layers: blocks of the large and of the small one.
        factorized_bits: bits of each sub-token, the lowest first; their sum is the number of bits of an id.
        multiple_of: the feed-forward width, 8/3 of dim, is rounded up to a multiple of this.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 there is no null
            class, and guidance is refused.
        token_drop, attn_drop, proj_drop, ffn_drop: as in ``Llama``.
        rope_base, norm_eps: base of the rotary frequencies, eps of the RMS norms.
        positions: "rope2d" for tokens on a raster, as released; "rope1d" for others.

    Raises:
        ValueError: a spec without ids, with several ids per position, or, with "rope2d", without a raster; or
            factorized_bits that do not sum to the bits of an id.
    """

    registry_name = "open_magvit2_gpt"
    token_embedding: ModuleList[nn.Embedding]
    output: ModuleList[nn.Linear]

    options_type = SubTokenOptions
    tiny = {
        "spec": TokenSpec(16, 32, dim=5, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_intra_layers": 1,
        "num_heads": 2,
        "factorized_bits": (2, 3),
        "multiple_of": 16,
    }
    sizes = SIZES
    checkpoints = tuple(
        OfficialCheckpoint(
            f"TencentARC/Open-MAGVIT2-AR-{name}-256-resolution",
            f"AR_256_{name}.ckpt",
            official.config(SIZES[name]),
            tokenizer="TencentARC/Open-MAGVIT2-Tokenizer-256-resolution/imagenet_256_L.ckpt",
        )
        for name in SIZES
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 1024,
        num_layers: int = 24,
        num_intra_layers: int = 2,
        num_heads: int = 16,
        factorized_bits: tuple[int, ...] = (6, 12),
        multiple_of: int = 256,
        condition_dropout: float = 0.1,
        token_drop: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.1,
        ffn_drop: float = 0.1,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        positions: Literal["rope2d", "rope1d"] = "rope2d",
    ):
        self.sub_tokens = SubTokens(factorized_bits)  # before the base's constructor, which calls build_embedding
        self.num_parts = len(self.sub_tokens.bits)
        spec = as_dataclass(TokenSpec, spec)
        codes = 2 ** sum(self.sub_tokens.bits)
        if spec.discrete and spec.codebook_size != codes:
            raise ValueError(
                f"factorized_bits {self.sub_tokens.bits} add up to {sum(self.sub_tokens.bits)} bits, which are {codes} "
                f"codes, but this tokenizer has {spec.codebook_size}; choose bits that add up to those of its ids"
            )
        drops: dict[str, Any] = {"attn_drop": attn_drop, "proj_drop": proj_drop, "ffn_drop": ffn_drop}
        super().__init__(
            spec,
            num_classes=num_classes,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            multiple_of=multiple_of,
            condition_dropout=condition_dropout,
            token_drop=token_drop,
            rope_base=rope_base,
            norm_eps=norm_eps,
            positions=positions,
            **drops,
        )
        hidden_dim = rounded_hidden_dim(dim, multiple_of)
        self.intra_blocks = ModuleList(
            self.block_type(dim, num_heads, hidden_dim, eps=norm_eps, **drops) for _ in range(num_intra_layers)
        )
        for module in self.intra_blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def build_embedding(self, dim: int) -> ModuleList[nn.Embedding]:
        return ModuleList(nn.Embedding(size, dim) for size in self.sub_tokens.sizes)

    def build_output(self, dim: int) -> ModuleList[nn.Linear]:
        return ModuleList(nn.Linear(dim, size, bias=False) for size in self.sub_tokens.sizes)

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        return super(Llama, cls).condition_arguments(spec)  # of class labels alone, unlike Llama

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Raise ValueError: the compiled step draws whole ids."""
        raise ValueError(f"{type(self).__name__} has no compiled decoding: it draws an id in {self.num_parts} parts")

    def split_ids(self, ids: Tensor) -> Sequence[Tensor]:
        return self.sub_tokens.split(ids)

    def join_ids(self, parts: Sequence[Tensor]) -> Tensor:
        return self.sub_tokens.join(parts)

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        return torch.stack([table(part) for table, part in zip(self.token_embedding, self.split_ids(ids))]).sum(0)

    def step_logits(self, hidden: Tensor, count: int) -> Tensor:
        return self.part_logits(hidden, count, ())

    def part_logits(self, hidden: Tensor, count: int, parts: Sequence[Tensor]) -> Tensor:
        return self._intra_logits(hidden[:, -count:], parts, first=len(parts))[0]

    def part_predictions(self, ids: Tensor, condition: Condition, context: Tensor | None = None) -> list[Tensor]:
        """Teacher-forced logits (B, L, V_p) of each sub-token of ids (B, L). Position i sees the condition, ids[:, :i]
        (or context[:, :i], if given), and the earlier sub-tokens of ids[:, i]."""
        return self.target_logits(self._hidden(ids if context is None else context, condition), ids)

    def _hidden(self, ids: Tensor, condition: Condition) -> Tensor:
        """The large transformer's hidden states (B, L, D) that predict ids (B, L), each from the ids before it."""
        x = self.embed_sequence(ids[:, :-1], condition)
        return self.transform(x, slice(0, x.shape[1]), None, None)

    def target_logits(self, hidden: Tensor, ids: Tensor) -> list[Tensor]:
        return self._intra_logits(hidden, self.split_ids(ids)[:-1], first=0)

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        hidden, parts = self._hidden(tokens, self.drop_condition(condition, draws)), list[Tensor]()
        for uniforms in draws["own"].unbind(-1):  # each sub-token is drawn given the model's own earlier ones
            (logits,) = self._intra_logits(hidden, parts, first=len(parts))
            parts.append(inverse_cdf_ids(logits, uniforms))
        return self.join_ids(parts)

    def logits(self, ids: Tensor, condition: Condition) -> Tensor:
        """The concatenated ``part_predictions``, (B, L, sum of all V_p)."""
        return torch.cat(self.part_predictions(ids, condition), -1)

    def _intra_logits(self, hidden: Tensor, parts: Sequence[Tensor], first: int) -> list[Tensor]:
        """Logits (R, n, V_p) of the sub-tokens from number ``first`` to number len(parts), for positions with hidden
        states (R, n, D) and first sub-tokens ``parts`` (R, n)."""
        rows = [hidden, *(table(part) for table, part in zip(self.token_embedding, parts))]
        x = torch.stack(rows, 2).flatten(0, 1)  # (R * n, p + 1, D): each position is a sequence of its own
        # As in the released models, the hidden state and the sub-tokens are rotated like the class and the first image
        # tokens. With "rope2d" the hidden state's query and key are therefore zero, like those of the class.
        rotation = None if self.rotation is None else self.rotation(slice(0, len(rows)))
        for block in self.intra_blocks:
            x = block(x, rotation, None, None)
        x = self.norm(x).unflatten(0, hidden.shape[:2])
        return [self.output[part](x[:, :, part]).float() for part in range(first, len(rows))]

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        clock: Clock | None = None,
        tokenizer: Expands | None = None,
        context: Tensor | None = None,
    ) -> GeneratorOutput:
        """The sum of the sub-tokens' cross entropies in nats per token, (weighted) mean over samples.

        Metrics: "accuracy", the share of correct ids; "loss_i" and "accuracy_i" of each sub-token.
        """
        self.check_tokenizer(tokenizer)
        condition = self.drop_condition(condition, draws)
        predictions, parts = self.part_predictions(tokens, condition, context), self.split_ids(tokens)
        losses, right = [], []
        metrics: dict[str, Tensor] = {}
        for number, (logits, part) in enumerate(zip(predictions, parts)):
            per_sample = F.cross_entropy(logits.transpose(1, 2), part, reduction="none").mean(1)
            losses.append(weighted_mean(per_sample, weights))
            right.append(logits.detach().argmax(-1) == part)
            metrics |= {f"loss_{number}": losses[-1].detach(), f"accuracy_{number}": right[-1].float().mean()}
        metrics["accuracy"] = torch.stack(right).all(0).float().mean()
        return GeneratorOutput(torch.stack(losses).sum(), torch.cat(predictions, -1), metrics)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(rename(state_dict, official.OFFICIAL_NAMES))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the tokenizer, which released files also hold, and sampling caches."""
        return second_stage(state)
