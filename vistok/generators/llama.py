"""Llama over image tokens: RMS norm, SwiGLU, rotary positions; conditioned on a class or on caption features.

Paper: Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (arXiv 2406.06525), section 3.2.
Official weights and conventions: github.com/FoundationVision/LlamaGen (MIT). D-AR (arXiv 2505.23660) generates with the
same model, with one-dimensional positions; its weights come from github.com/showlab/D-AR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vistok.checkpoints import CheckpointError, OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.cache import CachedLayer, CachedLayers, of_layers
from vistok.nn.attention import Attention, Mask
from vistok.nn.containers import ModuleList
from vistok.nn.masks import prolonged, visible_causal_mask
from vistok.nn.mlp import SwiGLU, rounded_hidden_dim
from vistok.nn.norms import RMSNorm
from vistok.nn.positions import sincos_1d
from vistok.nn.rotary import FixedRotation, Positions, Rotation, grid_positions, rotation_table
from vistok.types import Condition, ConditionSpec, FeatureSpec, IdSpec, TokenSpec, as_dataclass

SIZES = {
    "B": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20},
    "XXL": {"dim": 1536, "num_layers": 48, "num_heads": 24},
    "XXXL": {"dim": 2560, "num_layers": 48, "num_heads": 40},
    "1B": {"dim": 2048, "num_layers": 22, "num_heads": 32},
    "3B": {"dim": 3200, "num_layers": 24, "num_heads": 32},
    "7B": {"dim": 4096, "num_layers": 32, "num_heads": 32},
}
PositionKind = Literal["rope2d", "rope1d", "learned", "sincos"]


def _official(size: str, block_size: int) -> dict[str, Any]:
    dim, num_layers, num_heads = SIZES[size].values()
    return {"dim": dim, "n_layer": num_layers, "n_head": num_heads, "block_size": block_size, "vocab_size": 16384}


def _official_t2i(block_size: int) -> dict[str, Any]:
    return _official("XL", block_size) | {"model_type": "t2i", "cls_token_num": 120, "caption_dim": 2048}


class LlamaBlock(nn.Module):
    """Pre-norm block of causal attention and SwiGLU: (B, N, D) -> (B, N, D)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        eps: float,
        attn_drop: float,
        proj_drop: float,
        ffn_drop: float,
    ):
        super().__init__()
        self.norm1 = RMSNorm(dim, eps)
        self.attn = Attention(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            qkv_bias=False,
            out_bias=False,
            qk_norm=nn.LayerNorm if qk_norm else None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.norm2 = RMSNorm(dim, eps)
        self.ffn = SwiGLU(dim, hidden_dim, drop=ffn_drop)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: CachedLayer | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask, causal=mask is None, rotation=rotation, cache=cache)
        return x + self.ffn(self.norm2(x))


T5 = ("cleaning", "google/flan-t5-xl")
C2I_TOKENIZER, T2I_TOKENIZER = "FoundationVision/LlamaGen/vq_ds16_c2i.pt", "peizesun/llamagen_t2i/vq_ds16_t2i.pt"


class Llama(AutoregressiveGenerator):
    """A causal transformer over [condition, image tokens]; the condition is a class token, a caption or given tokens.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: number of classes; 0 for unconditional generation. Not used with captions.
        dim, num_layers, num_heads: width, blocks, heads; num_heads divides dim.
        multiple_of: the feed-forward width, 8/3 of dim, is rounded up to a multiple of this.
        caption_dim: channels of caption features (T5), or None for the class-conditional model.
        caption_length: positions of a caption. Features are padded on the left, with a mask.
        condition_dropout: share of training samples whose condition is dropped, for guidance; with 0 there is no null
            condition, and guidance is refused.
        token_drop, attn_drop, proj_drop, ffn_drop: dropout of the embedded sequence, the
            attention weights, the attention output and the feed-forward output, in training.
        positions: "rope2d" rotates image tokens by row and column and switches the condition's queries and keys off,
            as in LlamaGen (see ``position_table``); "rope1d" rotates the whole sequence, the condition first
            (D-AR); "learned" adds a vector per position (GigaTok, the generators of FlexTok's paper), "sincos" a fixed
            one.
        rope_base: base of the rotary frequencies.
        norm_eps: eps of the RMS norms.
        condition_tokens: number of conditioning tokens of the same tokenizer (frame prediction), which a learned
            separator follows. 0 for a model of classes or captions.
        num_positions: rows of the "learned" or "sincos" table; None is one per position of the sequence. The last token
            is never fed, so one row fewer suffices (LARP).
        drop_before_positions: whether token dropout comes before these positions are added (LARP), or after.
        ffn_dim_multiplier: factor on 8/3 of dim, before it is rounded up.
        init_std: standard deviation of the initial weights.
        num_kv_heads: number of key and value heads, a divisor of num_heads; None is num_heads.
        qk_norm: layer norm of queries and keys over the channels of each head, before the rotation.
        position_std: initial standard deviation of "learned" positions; None is init_std.

    Raises:
        ValueError: a spec without ids, with several ids per position, or, with "rope2d", without a raster; captions and
            condition tokens together; or too few positions.
    """

    null_caption: Tensor
    positions: Tensor | None
    rotation: FixedRotation | None

    block_type: ClassVar[type[nn.Module]] = LlamaBlock
    norm_type: ClassVar[type[nn.Module]] = RMSNorm
    registry_name = "llama"
    plain_sequence = {"positions": "rope1d"}
    tiny = {
        "spec": TokenSpec(16, 32, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "multiple_of": 16,
    }
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZES
    checkpoints: ClassVar[tuple[OfficialCheckpoint, ...]] = (
        OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_B_256.pt", _official("B", 256), tokenizer=C2I_TOKENIZER),
        OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_B_384.pt", _official("B", 576), tokenizer=C2I_TOKENIZER),
        OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_L_256.pt", _official("L", 256), tokenizer=C2I_TOKENIZER),
        OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_L_384.pt", _official("L", 576), tokenizer=C2I_TOKENIZER),
        OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_XL_384.pt", _official("XL", 576), tokenizer=C2I_TOKENIZER),
        OfficialCheckpoint(
            "FoundationVision/LlamaGen", "c2i_XXL_384.pt", _official("XXL", 576), tokenizer=C2I_TOKENIZER
        ),
        OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_3B_384.pt", _official("3B", 576), tokenizer=C2I_TOKENIZER),
        OfficialCheckpoint(
            "peizesun/llamagen_t2i",
            "t2i_XL_stage1_256.pt",
            _official_t2i(256),
            tokenizer=T2I_TOKENIZER,
            text_encoder=T5,
        ),
        OfficialCheckpoint(
            "peizesun/llamagen_t2i",
            "t2i_XL_stage2_512.pt",
            _official_t2i(1024),
            tokenizer=T2I_TOKENIZER,
            text_encoder=T5,
        ),
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        multiple_of: int = 256,
        caption_dim: int | None = None,
        caption_length: int = 120,
        condition_dropout: float = 0.1,
        token_drop: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.1,
        ffn_drop: float = 0.1,
        positions: PositionKind = "rope2d",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        condition_tokens: int = 0,
        num_positions: int | None = None,
        drop_before_positions: bool = False,
        ffn_dim_multiplier: float = 1.0,
        init_std: float = 0.02,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        position_std: float | None = None,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        self.condition_dropout, self.takes_captions = condition_dropout, caption_dim is not None
        if self.takes_captions and condition_tokens:
            raise ValueError("a model takes captions or condition tokens, not both; leave caption_dim or them out")
        self.condition_tokens = condition_tokens
        self.condition_length = caption_length if self.takes_captions else condition_tokens + 1
        self.num_classes = None if self.takes_captions or condition_tokens else num_classes or None
        if caption_dim is not None:
            self.caption_projection = nn.Sequential(
                nn.Linear(caption_dim, dim, bias=False), nn.GELU("tanh"), nn.Linear(dim, dim, bias=False)
            )
            # Drawn once and never trained, as in the reference; saved, because the model trains with these values.
            self.register_buffer("null_caption", torch.randn(caption_length, caption_dim) / math.sqrt(caption_dim))
        elif not condition_tokens:
            self.class_embedding = nn.Embedding(num_classes + self.has_null, dim)
        self.token_embedding = self.build_embedding(dim)
        self.dropout = nn.Dropout(token_drop)
        self.drop_before_positions = drop_before_positions
        hidden_dim = rounded_hidden_dim(dim, multiple_of, ffn_dim_multiplier)
        self.blocks = ModuleList(
            self.block_type(
                dim,
                num_heads,
                hidden_dim,
                num_kv_heads=num_kv_heads,
                qk_norm=qk_norm,
                eps=norm_eps,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                ffn_drop=ffn_drop,
            )
            for _ in range(num_layers)
        )
        self.norm = self.norm_type(dim, norm_eps)
        self.output = self.build_output(dim)
        if positions in ("learned", "sincos"):
            self.rotation = None
            rows = absolute_rows(num_positions, self.condition_length + self.spec.length)
            if positions == "learned":
                self.positions = nn.Parameter(torch.randn(rows, dim) * (position_std or init_std))
            else:
                self.register_buffer("positions", sincos_1d(torch.arange(rows), dim).float())
        else:
            table = position_table(self.spec, self.condition_length, dim // num_heads, positions, rope_base)
            self.rotation, self.positions = FixedRotation(table), None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def build_embedding(self, dim: int) -> nn.Module:
        """The embedding of ids; a model with condition tokens has the separator as last row."""
        return nn.Embedding(self.spec.num_ids + (self.condition_tokens > 0), dim)

    def build_output(self, dim: int) -> nn.Module:
        """The output head, (..., D) -> (..., V)."""
        return nn.Linear(dim, self.spec.num_ids, bias=False)

    @property
    def has_null(self) -> bool:
        """As of every generator; a model of condition tokens has no null condition."""
        return not self.condition_tokens and super().has_null

    @property
    def condition_spec(self) -> ConditionSpec:
        """Class labels, caption features, or given tokens."""
        if self.condition_tokens:
            return ConditionSpec(given=IdSpec(self.spec.num_ids, self.condition_tokens))
        if self.takes_captions:
            length, dim = self.null_caption.shape
            return ConditionSpec(features=FeatureSpec(dim, length))
        return super().condition_spec

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        """Arguments for exactly one of class labels, text features and given tokens: the sequence begins with it."""
        part = next((name for name in ("given", "features") if name in spec.parts), "labels")
        cls.refuse_parts(spec, part)
        if part == "given":
            if not isinstance(spec.given, IdSpec):
                raise ValueError(f"{cls.registry_name} takes given tokens as ids, and these data have latents")
            return {"num_classes": 0, "condition_tokens": spec.given.length}
        if part == "features" and spec.features is not None:
            return {"num_classes": 0, "caption_dim": spec.features.dim, "caption_length": spec.features.length}
        return super().condition_arguments(spec)

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        if self.condition_tokens:
            return self._embed_given(condition)
        return self._embed_caption(condition) if self.takes_captions else self._embed_class(condition)

    def _embed_class(self, condition: Condition) -> Tensor:
        """(R, 1, D)."""
        return self.class_embedding(self.class_rows(condition))[:, None]

    def _embed_given(self, condition: Condition) -> Tensor:
        """(R, T + 1, D) from given ids (R, T), followed by the separator."""
        given = condition.parts["given"].values
        separator = torch.full_like(given[:, :1], self.spec.num_ids)
        return self.token_embedding(torch.cat([given, separator], 1))

    def _embed_caption(self, condition: Condition) -> Tensor:
        """(R, T, D) from features whose padding is set to zero; null captions have no padding."""
        null = self.null_caption.expand(len(condition), -1, -1)
        if condition.features is None:
            return self.caption_projection(null)
        features = condition.features.to(null.dtype)
        if condition.mask is not None:
            features = features * condition.mask[..., None]
        return self.caption_projection(torch.where(condition.dropped[:, None, None], null, features))

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        return self.token_embedding(ids)

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """Causal mask without the caption's padding."""
        if condition.mask is None:
            return None
        return visible_causal_mask(prolonged(condition.mask, stop), start)

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        return self._run(self.blocks, x, positions, mask, kv_cache, *state)

    def _run(
        self,
        blocks: ModuleList,
        x: Tensor,
        positions: Positions,
        mask: Mask | None,
        kv_cache: CachedLayers | None,
        *state: Tensor,
    ) -> Tensor:
        if self.drop_before_positions:
            x = self.dropout(x)
        if self.positions is not None:
            x = x + self.positions[positions]
        if not self.drop_before_positions:
            x = self.dropout(x)
        rotation = None if self.rotation is None else self.rotation(positions)
        for block, memory in zip(blocks, of_layers(kv_cache, len(blocks))):
            x = block(x, rotation, mask, memory, *state)
        return x

    def hidden_states(self, ids: Tensor, condition: Condition, layer: int) -> Tensor:
        """Teacher-forced outputs of block number ``layer``, counted from 1: image features for probing.

        Args:
            ids: (B, L) tokens, of which the last is not fed.

        Returns:
            (B, T + L - 1, dim), of the T condition tokens and the first L - 1 image tokens.

        Raises:
            ValueError: there is no such block.
        """
        if not 1 <= layer <= len(self.blocks):
            raise ValueError(f"layer must be one of the blocks 1..{len(self.blocks)}, got {layer}")
        x = self.embed_sequence(ids[:, :-1], condition)
        mask, state = self.attention_mask(condition, 0, x.shape[1]), self.condition_state(condition)
        return self._run(self.blocks[:layer], x, slice(0, x.shape[1]), mask, None, *state)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, WITHOUT_EFFECT)
        num_heads, kind = given.take("n_head"), given.take("model_type", "c2i")
        if kind not in ("c2i", "t2i"):
            raise CheckpointError(f"model_type {kind!r} is not known; there are 'c2i' and 't2i'")
        length, captions = given.take("block_size", 256), kind == "t2i"
        if not captions:
            given.require("cls_token_num", 1, why="a class is one token")
        given.require("ffn_dim_multiplier", None, why="no released model has it")
        given.require("drop_path_rate", 0.0, why="no released model has it")
        positions, side = given.take("positions", "rope2d"), math.isqrt(length)
        # The released tokenizers have codes of 8 channels; the transformer itself does not depend on them.
        grid = (side, side) if positions == "rope2d" else None
        spec = TokenSpec(length, given.take("vocab_size", 16384), dim=8, grid=grid)
        model = cls(
            spec,
            num_classes=1000 if captions else given.take("num_classes", 1000),
            dim=given.take("dim"),
            num_layers=given.take("n_layer"),
            num_heads=num_heads,
            num_kv_heads=given.take("n_kv_head", None),
            multiple_of=given.take("multiple_of", 256),
            caption_dim=given.take("caption_dim", 2048) if captions else None,
            caption_length=given.take("cls_token_num", 120) if captions else 120,
            condition_dropout=given.take("class_dropout_prob", 0.1),
            token_drop=given.take("token_dropout_p", 0.1),
            attn_drop=given.take("attn_dropout_p", 0.0),
            proj_drop=given.take("resid_dropout_p", 0.1),
            ffn_drop=given.take("ffn_dropout_p", 0.1),
            positions=positions,
            rope_base=given.take("rope_base", 10000),
            norm_eps=given.take("norm_eps", 1e-5),
        )
        given.finish()
        return model.with_official_weights(rename(state_dict, OFFICIAL_NAMES))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the rotary table and the sampling cache that some released files hold; both are recomputed."""
        return {
            key: tensor for key, tensor in state.items() if key != "freqs_cis" and ".attention.kv_cache." not in key
        }


WITHOUT_EFFECT = {
    "initializer_range": "the deviation of weights before training",
    "max_batch_size": "the size of a cache, which is made to measure",
    "max_seq_len": "the size of a cache, which is made to measure",
    "caption_dim": "of models with captions, and this one has classes",
    "num_classes": "of models with classes, and this one has captions",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

OFFICIAL_NAMES = [
    (r"cls_embedding\.embedding_table\.weight", r"class_embedding.weight"),
    (r"cls_embedding\.cap_proj\.fc1\.weight", r"caption_projection.0.weight"),
    (r"cls_embedding\.cap_proj\.fc2\.weight", r"caption_projection.2.weight"),
    (r"cls_embedding\.uncond_embedding", r"null_caption"),
    (r"tok_embeddings\.weight", r"token_embedding.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"blocks.\1.attn.out.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"blocks.\1.ffn.gate.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"blocks.\1.ffn.up.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.ffn.down.weight"),
]


def position_table(
    spec: TokenSpec, condition_length: int, head_dim: int, positions: PositionKind, base: float
) -> Rotation:
    """The rotation of every sequence position, (condition_length + length, head_dim / 2).

    With "rope2d" the condition's rows are zero, cosines too. This makes its queries and keys zero, so every image token
    gives all condition tokens the attention logit 0. The released models were trained so.

    Raises:
        ValueError: "rope2d" without a (h, w) grid or a square number of tokens, or an unknown name.
    """
    if positions == "rope1d":
        return rotation_table(torch.arange(condition_length + spec.length)[:, None], head_dim, base=base)
    if positions != "rope2d":
        raise ValueError(f"positions must be 'rope2d', 'rope1d', 'learned' or 'sincos', got {positions!r}")
    side = math.isqrt(spec.length)
    grid = spec.grid or ((side, side) if side * side == spec.length else ())
    if len(grid) != 2:
        raise ValueError(
            f"'rope2d' needs tokens on an image raster; this tokenizer has {spec.length} with grid {spec.grid}. "
            "Take positions='rope1d' for plain sequences"
        )
    table = rotation_table(grid_positions(grid), head_dim, base=base)
    return Rotation(*(torch.cat([part.new_zeros(condition_length, part.shape[1]), part]) for part in table))


def absolute_rows(num_positions: int | None, length: int) -> int:
    """Rows of a table of absolute positions for sequences of ``length``, whose last position is never fed.

    Raises:
        ValueError: num_positions is below length - 1.
    """
    if num_positions is not None and num_positions < length - 1:
        raise ValueError(f"num_positions is {num_positions}, but the sequence has {length - 1} positions that are fed")
    return num_positions or length
