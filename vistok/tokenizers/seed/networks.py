"""The networks of SEED: frozen towers, the Q-Former, and the blocks after the codes (arXiv 2307.08041, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import load_strictly, read_weights
from vistok.losses.efficientnet import NAME as EFFICIENTNET
from vistok.losses.efficientnet import EfficientNetFeatures
from vistok.nn.attention import attend
from vistok.nn.containers import ModuleList
from vistok.nn.mlp import MLP
from vistok.nn.vit import ViTBlock

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BERT_EPS = 1e-12


@dataclass(frozen=True)
class TowerConfig:
    """Config of a frozen network that reads images: a vision transformer of timm, or "efficientnet_lite0".

    timm's models are built without weights; the weights are part of the saved model. "efficientnet_lite0" brings its
    own (``losses.efficientnet``): its features of stride 16 are the tokens; the mean of those of stride 32 is the
    embedding.

    Attributes:
        name: name in timm, or "efficientnet_lite0".
        dim, num_layers, num_heads, patch_size: sizes that override those of timm's model.
        resize_to: side to which images are resized (bicubic) for "efficientnet_lite0"; None keeps their size.
    """

    name: str
    dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    resize_to: int | None = None

    def __post_init__(self) -> None:
        sizes = [self.dim, self.num_layers, self.num_heads, self.patch_size]
        if self.name == EFFICIENTNET and any(size is not None for size in sizes):
            raise ValueError(f"{self.name} has sizes of its own; leave dim, num_layers, num_heads and patch_size out")
        if self.name != EFFICIENTNET and self.resize_to is not None:
            raise ValueError(f"resize_to is of {EFFICIENTNET}; {self.name} is built for the image size")


class Tower(nn.Module):
    """A frozen network that reads pixels in [-1, 1]. Transformers get CLIP's colour statistics (arXiv 2103.00020).

    Args:
        config: the network.
        image_size: (height, width) of the pixels.
        embedding_dim: channels E of the pooled and projected embedding that is returned; None returns the tokens
            before the final norm instead.

    Raises:
        ValueError: a model that timm does not have or that is no vision transformer, or sizes that do not fit.
    """

    model: Any  # timm's models do not declare their attributes
    mean: Tensor
    std: Tensor

    def __init__(self, config: TowerConfig, image_size: tuple[int, int], embedding_dim: int | None = None):
        super().__init__()
        self.gives_tokens, self.resize_to = embedding_dim is None, config.resize_to
        mean, std = CLIP_MEAN, CLIP_STD
        if config.name == EFFICIENTNET:
            self.model = EfficientNetFeatures(16 if self.gives_tokens else 32)
            self._features, mean, std = self.model.dim, self.model.mean, self.model.std
            if embedding_dim not in (None, self._features):
                raise ValueError(f"target_dim is {embedding_dim}, but {config.name} has {self._features} channels")
        else:
            self.model = self._transformer(config, image_size, embedding_dim)
            self._features = self.model.num_features
        self.requires_grad_(False)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def _transformer(self, config: TowerConfig, image_size: tuple[int, int], embedding_dim: int | None) -> nn.Module:
        import timm

        if not timm.is_model(config.name):
            raise ValueError(f"timm has no model {config.name!r}; timm.list_models('*vit*') names those there are")
        sizes = {
            "embed_dim": config.dim,
            "depth": config.num_layers,
            "num_heads": config.num_heads,
            "patch_size": config.patch_size,
        }
        own: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        try:
            model = timm.create_model(config.name, img_size=image_size, num_classes=embedding_dim or 0, **own)
        except TypeError as error:  # other networks have other arguments
            raise ValueError(f"{config.name} is no vision transformer of such sizes: {error}") from error
        if not hasattr(model, "num_prefix_tokens"):
            raise ValueError(f"{config.name} is no vision transformer; its tokens are needed")
        patch = model.patch_embed.patch_size
        if any(side % part for side, part in zip(image_size, patch)):
            raise ValueError(
                f"patches of {patch[0]}x{patch[1]} do not divide images of {image_size[0]}x{image_size[1]}, whose rest "
                f"{config.name} would not see; take a patch_size or an image_size that fits"
            )
        if self.gives_tokens:
            model.norm = model.fc_norm = nn.Identity()
        return model

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self._features

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def read(self, file: str | Path) -> None:
        """Read weights from a local ``file`` (safetensors or torch) under timm's names.

        Weights of layers after the last block are ignored if this tower returns tokens.

        Raises:
            CheckpointError: the file is absent, damaged, or of another transformer.
        """
        unused = ("norm.", "fc_norm.", "head.") if self.gives_tokens else ()
        state = {key: value for key, value in read_weights(Path(file)).items() if not key.startswith(unused)}
        load_strictly(self.model, state, source=str(file))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to all tokens (B, T, D), or to embeddings (B, E)."""
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        if isinstance(self.model, EfficientNetFeatures):
            if self.resize_to is not None:
                side = (self.resize_to, self.resize_to)
                pixels = F.interpolate(pixels, side, mode="bicubic", align_corners=False)
            tokens = self.model(pixels)
            return tokens if self.gives_tokens else tokens.mean(1)
        return self.model.forward_features(pixels) if self.gives_tokens else self.model(pixels)


class PostNormAttention(nn.Module):
    """Attention of BERT (arXiv 1810.04805), with the norm after the residual: (B, N, D) -> same.

    Args:
        dim: width D.
        num_heads: heads; must divide dim.
        context_dim: channels of the context, from which keys and values are computed; D if None.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key, self.value = (nn.Linear(context_dim or dim, dim) for _ in range(2))
        self.out, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, BERT_EPS)

    def forward(self, x: Tensor, context: Tensor, *, causal: bool = False) -> Tensor:
        projected = self.query(x), self.key(context), self.value(context)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in projected)
        return self.norm(self.out(attend(q, k, v, causal=causal)) + x)


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward; the norms follow the residuals.

    Args:
        dim, num_heads: width D and heads.
        mlp_dim: hidden width of the feed-forward.
        context_dim: channels C of the context; None leaves the cross-attention out.
        causal: whether a query attends only to itself and earlier ones.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, context_dim: int | None, causal: bool):
        super().__init__()
        self.causal = causal
        self.attention = PostNormAttention(dim, num_heads)
        self.cross_attention = None if context_dim is None else PostNormAttention(dim, num_heads, context_dim)
        self.mlp, self.norm = MLP(dim, mlp_dim, F.gelu), nn.LayerNorm(dim, BERT_EPS)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attention(x, x, causal=self.causal)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context)
        return self.norm(self.mlp(x) + x)


class QFormer(nn.Module):
    """Learned queries that read a context (BLIP-2, arXiv 2301.12597): (B, T, C) -> (B, N, D).

    Args:
        num_queries: N.
        dim, num_layers, num_heads: width D, layers and heads.
        mlp_dim: hidden width of the feed-forward.
        context_dim: channels C.
        cross_attention_every: k: layers 0, k, 2k, ... have cross-attention to the context.
        causal: whether a query attends only to itself and earlier ones.
    """

    def __init__(
        self,
        num_queries: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        mlp_dim: int,
        context_dim: int,
        cross_attention_every: int,
        causal: bool,
    ):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_queries, dim))
        self.norm = nn.LayerNorm(dim, BERT_EPS)
        self.layers = ModuleList(
            QFormerLayer(dim, num_heads, mlp_dim, None if i % cross_attention_every else context_dim, causal)
            for i in range(num_layers)
        )

    def forward(self, context: Tensor) -> Tensor:
        x = self.norm(self.queries).expand(len(context), -1, -1)  # (B, N, D)
        for layer in self.layers:
            x = layer(x, context)
        return x


class PositionedBlocks(nn.Module):
    """Learned positions and pre-norm transformer blocks, without a final norm: (B, N, D) -> same."""

    def __init__(self, length: int, dim: int, num_layers: int, num_heads: int):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, dim))
        self.blocks = ModuleList(ViTBlock(dim, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return x


def bottleneck(dim: int, inner: int, out: int) -> nn.Sequential:
    """Linear, tanh, linear."""
    return nn.Sequential(nn.Linear(dim, inner), nn.Tanh(), nn.Linear(inner, out))


def narrowing(dim: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers without biases from ``dim`` to each of ``widths`` in turn, with ReLU between them."""
    layers: list[nn.Module] = []
    for wide, narrow in zip((dim, *widths), widths):
        layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
