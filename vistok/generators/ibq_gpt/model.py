"""IBQ's generator: Llama with adaptive norms, modulated by the class.

Paper: Scalable Image Tokenization with Index Backpropagation Quantization (arXiv 2412.02692). Official weights and
conventions: github.com/TencentARC/SEED-Voken (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import CheckpointError, OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.checkpoints.weights import second_stage
from vistok.generators.engine.cache import CachedLayer, CachedLayers
from vistok.generators.llama import Llama, LlamaBlock
from vistok.nn.attention import Mask
from vistok.nn.modulation import modulate
from vistok.nn.norms import RMSNorm
from vistok.nn.rotary import Positions, Rotation
from vistok.types import Condition, ConditionSpec, TokenSpec

SIZES: dict[str, dict[str, Any]] = {
    "B": {"dim": 1024, "num_layers": 16, "num_heads": 16},
    "L": {"dim": 1280, "num_layers": 20, "num_heads": 20},
    "XL": {"dim": 1536, "num_layers": 24, "num_heads": 24, "gate_init": 1e-4},
    "XXL": {"dim": 1920, "num_layers": 30, "num_heads": 30, "gate_init": 1e-5},
}
INIT_STD = 0.02


def _official(size: str) -> dict[str, Any]:
    given = SIZES[size]
    sizes = {"n_layer": given["num_layers"], "n_head": given["num_heads"], "n_embd": given["dim"]}
    drops = {"resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "token_drop": 0.1}
    others = {"cond_dim": given["dim"], "alng": given.get("gate_init", 1e-3), "class_num": 1000}
    return {"vocab_size": 16384, "block_size": 256, **sizes, **drops, **others}


class ModulatedLlamaBlock(LlamaBlock):
    """Llama's block with adaptive norms (DiT, arXiv 2212.09748): (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, **options: Any):
        super().__init__(dim, num_heads, hidden_dim, **options)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: CachedLayer | None, *state: Tensor
    ) -> Tensor:
        """``state`` is the class vector (B, 1, D), after its activation."""
        (class_vector,) = state
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(class_vector).chunk(6, -1)
        y = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attn(y, mask=mask, causal=mask is None, rotation=rotation, cache=cache)
        return x + gate2 * self.ffn(modulate(self.norm2(x), shift2, scale2))


class ModulatedNorm(RMSNorm):
    """The RMS norm before the output head, modulated by the class vector (B, 1, D): (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        (class_vector,) = state
        scale, shift = self.modulation(class_vector).chunk(2, -1)
        return modulate(super().forward(x), shift, scale)


class IBQGPT(Llama):
    """A causal transformer over [class, image tokens]; the class also modulates every norm.

    Args:
        spec: the tokens to model: one id per position.
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        multiple_of: the feed-forward width, 8/3 of dim, is rounded up to a multiple of this.
        gate_init: factor on the initial weights of the residual gates (alng of the official code); smaller for larger
            models.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 there is no null
            class, and guidance is refused.
        token_drop, attn_drop, proj_drop, ffn_drop: as in ``Llama``.
        rope_base, norm_eps: base of the rotary frequencies, eps of the RMS norms.
        positions: "rope2d" for tokens on a raster, as released; "rope1d" for others.

    Raises:
        ValueError: a spec without ids, with several ids per position, or, with "rope2d", without a raster.
    """

    block_type = ModulatedLlamaBlock
    norm_type = ModulatedNorm
    registry_name = "ibq_gpt"
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
            f"TencentARC/IBQ-AR-{name}",
            f"AR_256_{name}.ckpt",
            _official(name),
            tokenizer="TencentARC/IBQ-Tokenizer-16384/imagenet256_16384.ckpt",
        )
        for name in SIZES
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 1024,
        num_layers: int = 16,
        num_heads: int = 16,
        multiple_of: int = 256,
        gate_init: float = 1e-3,
        condition_dropout: float = 0.1,
        token_drop: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.1,
        ffn_drop: float = 0.1,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        positions: Literal["rope2d", "rope1d"] = "rope2d",
    ):
        super().__init__(
            spec,
            num_classes=num_classes,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            multiple_of=multiple_of,
            condition_dropout=condition_dropout,
            token_drop=token_drop,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            ffn_drop=ffn_drop,
            rope_base=rope_base,
            norm_eps=norm_eps,
            positions=positions,
            init_std=INIT_STD,
        )
        with torch.no_grad():
            for module in (*self.blocks, self.norm):
                module.modulation.weight.mul_(0.5)
                module.modulation.bias.zero_()
            for block in self.blocks:
                block.modulation.weight[: 2 * dim].mul_(2 * gate_init)  # of both gates

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        return super(Llama, cls).condition_arguments(spec)  # of class labels alone, unlike Llama

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        """The class vector (R, 1, D) of all adaptive norms."""
        return (F.silu(self._embed_class(condition)),)

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        return self.norm(super().transform(x, positions, mask, kv_cache, *state), *state)

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden).float()

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**_arguments(config)).with_official_weights(rename(state_dict, OFFICIAL_NAMES))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return second_stage(state)


WITHOUT_EFFECT: dict[str, str] = {}
"""Arguments of the reference that do not change what the model computes, each with the reason."""


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    given = OfficialConfig(config, WITHOUT_EFFECT)
    dim, length = given.take("n_embd"), given.take("block_size", 256)
    side = math.isqrt(length)
    if side * side != length:
        raise CheckpointError(f"block_size {length} is no square; the positions are those of a square raster")
    given.require("cond_dim", dim, why="the class embedding is the first token")
    for name, off in (("embd_pdrop", 0.0), ("drop_path_rate", 0.0), ("shared_aln", False)):
        given.require(name, off, why="no released model has it")
    found = {
        # The released tokenizers have codes of 256 channels; the transformer itself does not depend on them.
        "spec": TokenSpec(length, given.take("vocab_size", 16384), dim=256, grid=(side, side)),
        "num_classes": given.take("class_num", 1000),
        "dim": dim,
        "num_layers": given.take("n_layer"),
        "num_heads": given.take("n_head"),
        "multiple_of": given.take("multiple_of", 256),
        "gate_init": given.take("alng", 1e-3),
        "token_drop": given.take("token_drop", 0.1),
        "attn_drop": given.take("attn_dropout_p", 0.0),
        "proj_drop": given.take("resid_dropout_p", 0.1),
        "ffn_drop": given.take("ffn_dropout_p", 0.1),
        "rope_base": given.take("rope_base", 10000.0),
        "norm_eps": given.take("norm_eps", 1e-5),
    }
    given.finish()
    return found


OFFICIAL_NAMES = [
    (r"class_emb\.embedding_table\.weight", r"class_embedding.weight"),
    (r"tok_emb\.weight", r"token_embedding.weight"),
    (r"head\.weight", r"output.weight"),
    (r"head_nm\.rmsnorm\.weight", r"norm.weight"),
    (r"head_nm\.ada_lin\.1\.(\w+)", r"norm.modulation.\1"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(\w+)", r"blocks.\1.modulation.\2"),
    (r"blocks\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"blocks\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"blocks\.(\d+)\.attention\.wo\.weight", r"blocks.\1.attn.out.weight"),
    (r"blocks\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"blocks\.(\d+)\.feed_forward\.w1\.weight", r"blocks.\1.ffn.gate.weight"),
    (r"blocks\.(\d+)\.feed_forward\.w3\.weight", r"blocks.\1.ffn.up.weight"),
    (r"blocks\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.ffn.down.weight"),
]
