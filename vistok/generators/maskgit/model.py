"""MaskGIT: a bidirectional transformer that fills in masked tokens, most confident ones first.

Paper: MaskGIT: Masked Generative Image Transformer (arXiv 2202.04200). The official weights and conventions are those
of TiTok's generators (arXiv 2406.07550): github.com/bytedance/1d-tokenizer (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import OfficialCheckpoint
from vistok.draws import Draws, Keys
from vistok.generators.base import Generator, check_draws, check_single_ids, weighted_mean
from vistok.generators.engine.sampling import inverse_cdf_ids
from vistok.generators.maskgit import official
from vistok.generators.maskgit.networks import NETWORKS
from vistok.generators.maskgit.sampling import MaskGITOptions, MaskGITSession
from vistok.types import Clock, Condition, Expands, GeneratorOutput, TokenSpec, as_dataclass

BERT = {"network": "bert", "dim": 768, "num_layers": 24, "num_heads": 16, "mlp_dim": 3072}
UVIT = {"network": "uvit", "dim": 1024, "num_layers": 20, "num_heads": 16, "mlp_dim": 4096}


class MaskGIT(Generator):
    """A bidirectional transformer over [class, tokens]; unknown tokens are masked.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: number of classes; 0 for unconditional generation.
        network: "bert" has post-norm blocks; "uvit" pre-norm blocks with skip connections between its halves.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim. "uvit" has one more block in the middle.
        mlp_dim: hidden width of the feed-forward; None is 4 dim.
        label_smoothing: of the cross entropy (MaskGIT: 0.1).
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 there is no null
            class, and guidance is refused.
        attn_drop, proj_drop: dropout of the attention weights, and of the outputs of attention and feed-forward.

    Raises:
        ValueError: a spec without ids, or with several per position; an unknown network.
    """

    registry_name = "maskgit"
    tiny = {"spec": TokenSpec(16, 32, dim=4, grid=(4, 4)), "num_classes": 5, "dim": 16, "num_layers": 2, "num_heads": 2}
    options_type = MaskGITOptions
    only_next = "it predicts hidden tokens from all others as it is"
    sizes = {"bert": BERT, "uvit": UVIT}
    checkpoints = (
        OfficialCheckpoint(
            "yucornetto/generator_titok_l32_imagenet",
            "model.safetensors",
            official.config(BERT, 32),
            tokenizer="yucornetto/tokenizer_titok_l32_imagenet/model.safetensors",
        ),
        OfficialCheckpoint(
            "yucornetto/generator_titok_b64_imagenet",
            "model.safetensors",
            official.config(BERT, 64),
            tokenizer="yucornetto/tokenizer_titok_b64_imagenet/model.safetensors",
        ),
        OfficialCheckpoint(
            "yucornetto/generator_titok_s128_imagenet",
            "model.safetensors",
            official.config(UVIT, 128),
            tokenizer="yucornetto/tokenizer_titok_s128_imagenet/model.safetensors",
        ),
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        network: Literal["bert", "uvit"] = "bert",
        dim: int = 768,
        num_layers: int = 24,
        num_heads: int = 16,
        mlp_dim: int | None = None,
        label_smoothing: float = 0.1,
        condition_dropout: float = 0.1,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
    ):
        super().__init__()
        self.spec = check_single_ids(as_dataclass(TokenSpec, spec), type(self).__name__)
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(map(repr, NETWORKS))}, got {network!r}")
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        self.label_smoothing, self.mask_id = label_smoothing, self.spec.num_ids
        # Rows of the embedding: the codes, the mask, the classes, the null class.
        self.class_rows_from = self.mask_id + 1
        self.network = NETWORKS[network](
            vocabulary=self.spec.num_ids + 1 + num_classes + 1,
            length=self.spec.length + 1,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim or 4 * dim,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.output = nn.Linear(dim, self.spec.num_ids)
        self.apply(_initialise)

    def predict(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Float32 logits (R, L, V) of ids (R, L), some of them ``mask_id``, for classes (R,) of ``class_rows``."""
        hidden = self.network(torch.cat([classes[:, None], ids], 1))
        return self.output(hidden[:, 1:]).float()

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
        """Cross entropy in nats per masked token; metric "accuracy" of masked tokens. Predictions are logits (B, L, V).

        Raises:
            ValueError: no draws, which choose the masked tokens.
        """
        self.check_tokenizer(tokenizer)
        if draws is None:
            raise ValueError("masks are random: pass training_draws(keys)")
        condition = self.drop_condition(condition, draws)
        masked = draws["masked"]
        fed = tokens if context is None else context
        logits = self.predict(fed.masked_fill(masked, self.mask_id), self.class_rows(condition))
        terms = F.cross_entropy(
            logits.transpose(1, 2), tokens, reduction="none", label_smoothing=self.label_smoothing
        )  # (B, L)
        count = masked.sum(1)
        per_sample = (terms * masked).sum(1) / count
        loss = weighted_mean(per_sample, weights)
        right = ((logits.detach().argmax(-1) == tokens) & masked).sum() / count.sum()
        return GeneratorOutput(loss, logits, {"accuracy": right})

    def replaced(self, uniforms: Tensor, share: float, draws: Draws) -> Tensor:
        """(B, L) bool: the unmasked tokens that are replaced."""
        return (uniforms < share) & ~draws["masked"]

    def own_draws(self, keys: Keys) -> Draws:
        """ "own" (B, L) uniform."""
        return {"own": keys.uniform("objective own", self.spec.length)}

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """The replaced tokens are masked like the others and drawn from the remaining ones, as in sampling."""
        rows = self.class_rows(self.drop_condition(condition, draws))
        logits = self.predict(tokens.masked_fill(draws["masked"] | replaced, self.mask_id), rows)
        return inverse_cdf_ids(logits, draws["own"])

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; "masked" (B, L) bool: the share of the arccos schedule at a uniform time, at least one
        token."""
        length = self.spec.length
        share = torch.acos(keys.uniform("mask_rate")) / (math.pi / 2)
        count = (share * length).ceil().long().clamp(1, length)
        rank = keys.permutation("order", length)
        return {"drop": keys.uniform("drop"), "masked": rank < count[:, None]}

    def sampling_draws(self, keys: Keys, options: MaskGITOptions | None = None) -> Draws:
        """ "ids" and "confidence" (B, S, L) uniform, for each of the S steps."""
        steps = (options or MaskGITOptions()).num_steps
        return {name: keys.uniform(name, steps, self.spec.length) for name in ("ids", "confidence")}

    def start(
        self,
        condition: Condition,
        options: MaskGITOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> MaskGITSession:
        options = options or MaskGITOptions()
        self.check_start(condition, options.guidance, tokenizer)
        check_draws(draws, len(condition), options.temperature, names=("ids", "confidence"))
        return MaskGITSession(self, condition, options, draws)

    def edit(
        self,
        tokens: Tensor,
        regenerate: Tensor,
        condition: Condition,
        options: MaskGITOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Regenerate some positions and keep the others: inpainting, if tokens have a place in the image.

        Args:
            tokens: (B, L) ids of the images.
            regenerate: (L,) or (B, L) bool, True where tokens are generated.
            condition: the class of the edited images.

        Returns:
            (B, L) ids.

        Raises:
            ValueError: ids of another tokenizer, or another shape of ``regenerate``.
        """
        kept = ~self.edited_positions(tokens, regenerate)
        session = self.start(condition, options, draws=draws, tokenizer=tokenizer)
        session.keep(tokens, kept)
        for _ in session.generate():
            pass
        return session.tokens.to(tokens.device)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(official.our_names(state_dict))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the table 0, 1, 2, … that old versions of transformers saved with BERT."""
        return {key: tensor for key, tensor in state.items() if key != "model.embeddings.position_ids"}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
