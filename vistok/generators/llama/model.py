"""Llama over image tokens: RMS norm, SwiGLU, rotary positions; conditioned on a class or on caption features.

Paper: Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (arXiv 2406.06525), section 3.2.
Official weights and conventions: github.com/FoundationVision/LlamaGen (MIT). D-AR (arXiv 2505.23660) and GigaTok (arXiv
2504.08736) generate with the same model, with other positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from vistok.checkpoints import load_strictly, rename
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.cache import Layer, Layers
from vistok.generators.llama import official
from vistok.nn.attention import Attention
from vistok.nn.mlp import SwiGLU, llama_hidden_dim
from vistok.nn.norms import RMSNorm
from vistok.nn.positions import sincos_1d
from vistok.nn.rotary import FixedRotation, Rotation, Rows, grid_positions, rotation_table
from vistok.types import Condition, TokenSpec, as_dataclass

Positions = Literal["rope2d", "rope1d", "learned", "sincos"]


class Block(nn.Module):
    """Pre-norm block of causal attention and SwiGLU: (B, N, D) -> (B, N, D)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        num_kv_heads: int,
        qk_norm: bool,
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

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: Layer | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask, causal=mask is None, rotation=rotation, cache=cache)
        return x + self.ffn(self.norm2(x))


class Llama(AutoregressiveGenerator):
    """A causal transformer over [condition, image tokens], the condition being one class token or a caption.

    Args:
        spec: the tokens to model (one id per position).
        num_classes: number of classes; 0 for unconditional generation. Not used with captions.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        num_kv_heads: heads of keys and values, which divides num_heads; as many if None.
        multiple_of: the feed-forward width, 8/3 of dim, is rounded up to a multiple of this.
        caption_dim: channels of caption features (T5), or None for the class-conditional model.
        caption_length: positions of a caption. Features are padded on the left, with a mask.
        condition_dropout: share of training samples whose condition is dropped, for guidance. With 0 a
            class-conditional model has no null class, and refuses guidance.
        token_drop, attn_drop, proj_drop, ffn_drop: dropout of the embedded sequence, the
            attention weights, the attention output and the feed-forward output, in training.
        positions: "rope2d" rotates image tokens by row and column and switches the condition's queries and keys off,
            as in LlamaGen (see ``position_table``); "rope1d" rotates the whole sequence, the condition first
            (D-AR); "learned" adds a learned vector per position, the condition's included (GigaTok, the generators of
            FlexTok's paper); "sincos" adds fixed sines and cosines.
        num_positions: rows of the table that "learned" and "sincos" add; None for those of the condition and of all
            tokens. The last token is never fed, so one less will do.
        position_std: deviation of "learned" positions at first.
        drop_positions: whether ``token_drop`` covers added positions too, or only what they are added to.
        rope_base: base of the rotary frequencies.
        norm_eps: eps of the RMS norms.
        qk_norm: layer norms of queries and of keys, over the channels of each head, before they are rotated.

    Raises:
        ValueError: a spec without ids, with several ids per position, or, with "rope2d", without a raster; heads that
            do not divide; positions of an unknown kind, or fewer of them than are fed.
    """

    registry_name = "llama"
    sizes = official.SIZES
    checkpoints = official.CHECKPOINTS

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
        positions: Positions = "rope2d",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        num_kv_heads: int | None = None,
        num_positions: int | None = None,
        position_std: float = 0.02,
        drop_positions: bool = True,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        self.condition_dropout, self.takes_captions = condition_dropout, caption_dim is not None
        self.condition_length = caption_length if self.takes_captions else 1
        self.num_classes = None if self.takes_captions else num_classes or None
        self.has_null = self.takes_captions or condition_dropout > 0 or not num_classes
        if self.takes_captions:
            self.caption_projection = nn.Sequential(
                nn.Linear(caption_dim, dim, bias=False), nn.GELU("tanh"), nn.Linear(dim, dim, bias=False)
            )
            # Drawn once and never trained, as in the reference; saved, because its values matter from then on.
            self.register_buffer("null_caption", torch.randn(caption_length, caption_dim) / math.sqrt(caption_dim))
        else:
            self.class_embedding = nn.Embedding(num_classes + self.has_null, dim)
        self.token_embedding = nn.Embedding(self.spec.codebook_size, dim)
        self.dropout = nn.Dropout(token_drop)
        hidden_dim = llama_hidden_dim(dim, multiple_of)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                hidden_dim,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                qk_norm=qk_norm,
                eps=norm_eps,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                ffn_drop=ffn_drop,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, self.spec.codebook_size, bias=False)
        self.rotation, self.positions, self.drop_positions = None, None, drop_positions
        if positions in ("learned", "sincos"):
            self._add_positions(positions, num_positions, dim, position_std)
        else:
            table = position_table(self.spec, self.condition_length, dim // num_heads, positions, rope_base)
            self.rotation = FixedRotation(table)
        self.apply(_initialise)
        nn.init.zeros_(self.output.weight)

    def _add_positions(self, kind: Positions, count: int | None, dim: int, std: float) -> None:
        whole = self.condition_length + self.spec.length
        count = whole if count is None else count
        if count < whole - 1:
            raise ValueError(
                f"num_positions is {count}, but a sequence of {self.condition_length} condition and {self.spec.length} "
                f"image tokens feeds {whole - 1}"
            )
        if kind == "learned":
            self.positions = nn.Parameter(torch.randn(count, dim) * std)
        else:
            del self.positions
            self.register_buffer("positions", sincos_1d(torch.arange(count), dim).float(), persistent=False)

    def check_condition(self, condition: Condition) -> None:
        """Raise ValueError for another kind of condition, a class out of range, features of another size, or dropped
        rows where there is no null class."""
        super().check_condition(condition)
        if condition.ids is not None:
            raise ValueError("this generator takes class labels or caption features, not condition ids")
        if self.takes_captions:
            self._check_features(condition)
        elif condition.features is not None:
            raise ValueError("this generator takes class labels, not features; build it with caption_dim for captions")
        elif condition.labels is None and not bool(condition.dropped.all()):
            raise ValueError("this generator needs class labels for the samples that are not dropped")
        if not self.has_null and bool(condition.dropped.any()):
            raise ValueError(
                "this generator was built without a null class (condition_dropout 0): it cannot generate "
                "unconditionally or with guidance, and every sample needs a class label"
            )

    def _check_features(self, condition: Condition) -> None:
        expected = tuple(self.null_caption.shape)
        if condition.features is None:
            if not bool(condition.dropped.all()):
                raise ValueError(f"this generator needs caption features (B, {expected[0]}, {expected[1]})")
        elif tuple(condition.features.shape[1:]) != expected:
            raise ValueError(
                f"caption features must be (B, {expected[0]}, {expected[1]}), padded on the left, got "
                f"{tuple(condition.features.shape)}"
            )

    def embed_condition(self, condition: Condition) -> Tensor:
        return self._embed_caption(condition) if self.takes_captions else self._embed_class(condition)

    def _embed_class(self, condition: Condition) -> Tensor:
        """(R, 1, D); the null class, if there is one, is the last row of the table."""
        ids = condition.labels
        if self.has_null:
            null = torch.full_like(condition.dropped, self.num_classes or 0, dtype=torch.int64)
            ids = null if ids is None else torch.where(condition.dropped, null, ids)
        return self.class_embedding(ids)[:, None]

    def _embed_caption(self, condition: Condition) -> Tensor:
        """(R, T, D) from features whose padding is set to zero; null captions are whole."""
        null = self.null_caption.expand(len(condition), -1, -1)
        if condition.features is None:
            return self.caption_projection(null)
        features = condition.features.to(null.dtype)
        if condition.mask is not None:
            features = features * condition.mask[..., None]
        return self.caption_projection(torch.where(condition.dropped[:, None, None], null, features))

    def embed_tokens(self, ids: Tensor, where: Rows) -> Tensor:
        return self.token_embedding(ids)

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """Causal, without the caption's padding; each position sees itself, so that no row is empty."""
        if condition.mask is None:
            return None
        visible = nn.functional.pad(condition.mask, (0, max(stop - self.condition_length, 0)), value=True)[:, :stop]
        queries, keys = (torch.arange(first, stop, device=visible.device) for first in (start, 0))
        offset = queries[:, None] - keys  # (stop - start, stop)
        return (offset > 0) & visible[:, None, None] | (offset == 0)  # (R, 1, stop - start, stop)

    def transform(self, x: Tensor, where: Rows, mask: Tensor | None, layers: Layers | None) -> Tensor:
        return self._run(self.blocks, x, where, mask, layers)

    def _run(self, blocks: nn.ModuleList, x: Tensor, where: Rows, mask: Tensor | None, layers: Layers | None) -> Tensor:
        if self.positions is None:
            x = self.dropout(x)
        elif self.drop_positions:
            x = self.dropout(x + self.positions[where])
        else:
            x = self.dropout(x) + self.positions[where]
        rotation = None if self.rotation is None else self.rotation(where)
        for block, memory in zip(blocks, layers or [None] * len(blocks)):
            x = block(x, rotation, mask, memory)
        return x

    def hidden_states(self, ids: Tensor, condition: Condition, layer: int) -> Tensor:
        """What block number ``layer``, counted from 1, gives under teacher forcing: features of an image to probe.

        Args:
            ids: (B, L) tokens, of which the last is not fed.

        Returns:
            (B, T + L - 1, dim), of the T condition tokens and of L - 1 image tokens.

        Raises:
            ValueError: there is no such block.
        """
        if not 1 <= layer <= len(self.blocks):
            raise ValueError(f"layer must be one of the blocks 1..{len(self.blocks)}, got {layer}")
        x = torch.cat([self.embed_condition(condition), self.embed_tokens(ids[:, :-1], slice(0, ids.shape[1] - 1))], 1)
        where = slice(0, x.shape[1])
        return self._run(self.blocks[:layer], x, where, self.attention_mask(condition, 0, x.shape[1]), None)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        model = cls(**official.model_arguments(config))
        load_strictly(model, rename(state_dict, official.OFFICIAL_NAMES), source="the official state dict")
        return model

    clean_official = staticmethod(official.clean_official)


def position_table(
    spec: TokenSpec, condition_length: int, head_dim: int, positions: Positions, base: float
) -> Rotation:
    """The rotation of every sequence position, (condition_length + length, head_dim / 2).

    With "rope2d" the condition's rows are zero, cosines too: its queries and keys vanish, so every image token gives
    all condition tokens the logit 0. That is how the released models were trained.

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


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
