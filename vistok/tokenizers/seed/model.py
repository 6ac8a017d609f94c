"""SEED: an image as causal semantic ids, for language models that understand and generate images.

Papers: Planting a SEED of Vision in Large Language Model (arXiv 2307.08041); Making LLaMA SEE and Draw with SEED
Tokenizer (arXiv 2310.01218), whose tokenizer this is. Official weights and conventions: github.com/AILab-CVC/SEED.

A causal Q-Former reads the tokens of a frozen vision transformer; its outputs are quantized. The codes are decoded to
one image embedding, which a diffusion model can render. The tokenizer itself renders no pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import OfficialCheckpoint
from vistok.checkpoints.official_config import OfficialConfig
from vistok.draws import Draws
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.seed import official
from vistok.tokenizers.seed.networks import PositionedBlocks, QFormer, Tower, TowerConfig, bottleneck, narrowing
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.sides import image_sides


class SEED(Tokenizer):
    """Images to ids by a causal Q-Former over a frozen vision transformer, and ids to an image embedding.

    Training has two stages. The first trains the Q-Former to match its last query with texts (the loss "text_contrast",
    section 3.1, with ``freeze_qformer`` False); the second freezes it and trains codes and decoder (section 3.2).

    Args:
        image_size: side of the images, or (height, width).
        in_channels: 3; the frozen transformers read colours.
        tower: the vision transformer whose tokens are read; None is for models that are given features.
        target_tower: the network whose embeddings, of ``target_dim`` channels, are the target of the decoder; it gives
            the loss term "image". None leaves that term out.
        context_dim: channels C of the vision transformer's tokens.
        dim, num_layers, num_heads, mlp_dim: of the Q-Former.
        num_queries: tokens L of an image.
        cross_attention_every: k: layers 0, k, 2k, ... of a Q-Former have cross-attention.
        causal: whether a query attends only to itself and earlier ones.
        freeze_qformer: whether the Q-Former, and the norm before it, keep their weights.
        codebook_size, code_dim: number of codes, and channels of one.
        codebook_restart_after: training steps after which an unused code is moved onto a latent; 0 turns this off.
        num_blocks, block_heads: of the two stacks of transformer blocks after the codes.
        reverse_layers: layers of the reverse Q-Former, which computes the embedding with one query. None computes it
            from all tokens, narrowed by ``image_down``.
        image_down: widths of the linear layers that narrow each token if there is no reverse Q-Former.
        target_dim: channels E of the image embedding.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``code_dim`` channels; other arguments of the codebook then have no effect.

    Raises:
        ValueError: another number of channels, a tower of another width than ``context_dim``, or a count below 1.
    """

    registry_name = "seed"
    renders = reconstructs = False
    embeds = True
    tiny = {
        "image_size": 16,
        "tower": {"name": "test_vit", "dim": 8, "num_layers": 1, "num_heads": 2, "patch_size": 4},
        "target_tower": {"name": "test_vit", "dim": 8, "num_layers": 1, "num_heads": 2, "patch_size": 8},
        "context_dim": 8,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_dim": 32,
        "num_queries": 8,
        "codebook_size": 32,
        "code_dim": 4,
        "num_blocks": 1,
        "block_heads": 2,
        "image_down": [8, 4],
        "target_dim": 6,
    }
    sizes = {"seed-2": {}}
    checkpoints = (OfficialCheckpoint("AILab-CVC/seed-tokenizer-2", "seed_quantizer.pt", official.RELEASED),)

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        tower: TowerConfig | None = None,
        target_tower: TowerConfig | None = None,
        context_dim: int = 1408,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        num_queries: int = 32,
        cross_attention_every: int = 2,
        causal: bool = True,
        freeze_qformer: bool = True,
        codebook_size: int = 8192,
        code_dim: int = 32,
        num_blocks: int = 4,
        block_heads: int = 12,
        reverse_layers: int | None = None,
        image_down: tuple[int, ...] = (256, 128, 32),
        target_dim: int = 1024,
        codebook_restart_after: int = 0,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        if in_channels != 3:
            raise ValueError(f"SEED reads images of 3 channels, got in_channels {in_channels}; repeat the grey channel")
        counts = {
            "num_queries": num_queries,
            "num_layers": num_layers,
            "cross_attention_every": cross_attention_every,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "reverse_layers": 1 if reverse_layers is None else reverse_layers,
            "image_down": min(image_down, default=1),
            "target_dim": target_dim,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if reverse_layers is None and not image_down:
            raise ValueError("image_down is empty; give the widths that narrow a token, or reverse_layers")
        sides = image_sides(image_size)
        self._input_shape = (in_channels, *sides)
        self.tower = None if tower is None else Tower(as_dataclass(TowerConfig, tower), sides)
        if self.tower is not None and self.tower.dim != context_dim:
            raise ValueError(f"context_dim is {context_dim}, but the tower's tokens have {self.tower.dim} channels")
        self.target_tower = (
            None if target_tower is None else Tower(as_dataclass(TowerConfig, target_tower), sides, target_dim)
        )
        options = {"mlp_dim": mlp_dim, "cross_attention_every": cross_attention_every}
        self.vision_norm = nn.LayerNorm(context_dim)
        self.qformer = QFormer(
            num_queries, dim, num_layers, num_heads, context_dim=context_dim, causal=causal, **options
        )
        self.freeze_qformer = freeze_qformer
        if freeze_qformer:
            self.vision_norm.requires_grad_(False)
            self.qformer.requires_grad_(False)
        self.to_latents = bottleneck(dim, dim, code_dim)
        self.quantizer = chosen_quantizer(
            quantizer,
            code_dim,
            lambda: VectorQuantizer(
                codebook_size, code_dim, normalize=False, init="uniform", restart_after=codebook_restart_after
            ),
        )
        self._spec = spec_of(self.quantizer, TokenSpec(num_queries, self.quantizer.codebook_size, code_dim))
        self.from_latents = bottleneck(code_dim, code_dim, dim)
        self.query_blocks, self.image_blocks = (
            PositionedBlocks(num_queries, dim, num_blocks, block_heads) for _ in range(2)
        )
        if reverse_layers is None:
            self.image_down: nn.Module | None = narrowing(dim, tuple(image_down))
            self.reverse: QFormer | None = None
            self.image_proj = nn.Linear(num_queries * image_down[-1], target_dim)
        else:
            self.image_down = None
            self.reverse = QFormer(1, dim, reverse_layers, num_heads, context_dim=dim, causal=False, **options)
            self.image_proj = nn.Linear(dim, target_dim)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """The terms of the quantizer, by default "codebook" and "commitment"; "query"; with a target tower "image"."""
        return (*self.quantizer.loss_terms, "query", *(("image",) if self.target_tower is not None else ()))

    @property
    def summary_features(self) -> Mapping[str, int]:
        """The Q-Former's outputs: the last query attends to all others (section 3.1)."""
        return {"queries": self.qformer.queries.shape[2]}

    def target_features(self, pixels: Tensor) -> Tensor:
        if self.target_tower is None:
            raise ValueError("this SEED has no target_tower, whose embeddings its own could be compared with")
        self.check_pixels(pixels)
        return self.target_tower(pixels)

    def read_tower(self, file: str | Path) -> None:
        """Read the vision transformer's weights from a local file under timm's names.

        Raises:
            ValueError: this model has none.
            CheckpointError: the file is absent, damaged, or of another transformer.
        """
        self._tower().read(file)

    def _tower(self) -> Tower:
        if self.tower is None:
            raise ValueError(
                "this SEED has no vision transformer to read pixels with: build it with tower=TowerConfig(NAME) and "
                "read its weights with read_tower(FILE), or give the features of yours to encode_features"
            )
        return self.tower

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to the frozen transformer's tokens (B, T, C).

        Raises:
            ValueError: pixels of another size, or a model without a tower.
        """
        self.check_pixels(pixels)
        return self._tower()(pixels)

    def query_features(self, features: Tensor) -> Tensor:
        """Vision features (B, T, C) to the Q-Former's outputs (B, L, D).

        Raises:
            ValueError: features of another shape.
        """
        channels = self.vision_norm.normalized_shape[0]
        if features.ndim != 3 or features.shape[2] != channels:
            raise ValueError(f"vision features must be (B, T, {channels}), got {tuple(features.shape)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_qformer):
            return self.qformer(self.vision_norm(features))

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to latents (B, L, code_dim), before quantization.

        Raises:
            ValueError: as ``features``.
        """
        return self.to_latents(self.query_features(self.features(pixels)))

    def encode_features(self, features: Tensor) -> Tensor:
        """Vision features (B, T, C), before their norm, to ids (B, L)."""
        return self.quantize(self.to_latents(self.query_features(features)))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        """Pixels in [-1, 1] to ids (B, L); ``draws`` is unused.

        Raises:
            ValueError: pixels of another size, or a model without a tower.
        """
        self.check_condition(condition)
        return self.encode_features(self.features(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Raises ValueError: there are no pixels; ``decode_features`` gives the image embedding."""
        self.check_condition(condition)
        return super().decode(tokens)

    def decode_features(self, tokens: Tensor) -> Tensor:
        """Ids (B, L), or multi-scale ids (see ``dequantize``), to image embeddings (B, E), not normalised.

        Raises:
            ValueError: ids out of range, or another number of them.
        """
        return self.embed(self.from_latents(self.dequantize(tokens)))

    def embed(self, decoded: Tensor) -> Tensor:
        """Decoded codes (B, L, D) to image embeddings (B, E)."""
        x = self.image_blocks(decoded)
        if self.image_down is not None:
            return self.image_proj(self.image_down(x).flatten(1))  # (B, L * width) -> (B, E)
        return self.image_proj(cast(QFormer, self.reverse)(x)[:, 0])

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """As ``forward_features``, with the embedding of ``target``, or else of the pixels, as its target.

        Raises:
            ValueError: as ``encode``.
        """
        self.check_condition(condition)
        features = self.features(pixels)
        if self.target_tower is None:
            return self.forward_features(features, draws=draws)
        return self.forward_features(features, self.target_features(pixels if target is None else target), draws=draws)

    def forward_features(
        self, features: Tensor, target: Tensor | None = None, *, draws: Draws | None = None
    ) -> TokenizerOutput:
        """The training pass from vision features (B, T, C).

        Losses: those of the quantizer, by default "codebook" and "commitment" (B, L); "query" (B, L), 1 - the cosine of
        the Q-Former's outputs and the decoded codes; with a ``target`` (B, E), "image" (B,), the mean squared error
        of the image embedding. Features: "queries" (B, L, D), "latents" and "quantized" (B, L, code_dim), and
        "image_embedding" (B, E). The paper's loss is 5 * (commitment + 0.25 * codebook) + 2 * query + 0.5 * image.

        Raises:
            ValueError: a target of another shape.
        """
        queries = self.query_features(features)
        latents = self.to_latents(queries)
        quantized = self.quantizer(latents, draws=draws)
        decoded = self.from_latents(quantized.quantized)
        embedding = self.embed(decoded)
        losses = quantized.losses | {"query": 1 - F.cosine_similarity(self.query_blocks(decoded), queries, dim=-1)}
        if target is not None:
            if target.shape != embedding.shape:
                raise ValueError(f"the target must be {tuple(embedding.shape)}, got {tuple(target.shape)}")
            losses["image"] = (embedding - target).square().mean(-1)
        outputs = {"queries": queries, "latents": latents, "quantized": quantized.quantized}
        return TokenizerOutput(None, quantized.ids, losses, outputs | {"image_embedding": embedding})

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the weights that read text, and buffers."""
        return official.own_keys(state)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build from the sizes in ``config``; the keys of the weights tell the kind of decoder and the other sizes."""
        given = OfficialConfig(config, official.without_effect(state_dict))
        arguments = official.arguments(given, state_dict)
        given.finish()
        return cls(**arguments).with_official_weights(official.our_names(state_dict))
