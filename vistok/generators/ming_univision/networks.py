"""The language model of Ming-UniVision, and the flow head that generates latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.flow import LinearPath, euler, guided, last, shift_time
from vistok.guidance import Guidance
from vistok.nn.attention import Attention, LayerCache
from vistok.nn.containers import ModuleList
from vistok.nn.diffusion_head import DiffusionHead
from vistok.nn.mlp import SwiGLU, two_thirds
from vistok.nn.moe import MixtureOfExperts
from vistok.nn.norms import RMSNorm
from vistok.nn.rotary import FixedRotation, Rotation, rotation_table

EPS = 1e-6
TIME_SCALE = 1000.0
PATH = LinearPath(noise_at=0)
"""The path in u = 1 - t, where t is the network's time: the head's velocity points from noise to data."""


@dataclass(frozen=True)
class BackboneConfig:
    """A causal language model: pre-norm blocks with RoPE, grouped-query attention, and dense or expert feed-forwards.

    Attributes:
        dim, num_layers, num_heads: width, blocks, heads.
        num_kv_heads: number of key and value heads; None is ``num_heads``.
        head_dim: channels of a head; None is ``dim // num_heads``.
        mlp_dim: hidden width of a dense feed-forward.
        num_experts: experts of a block; with 0 all blocks have dense feed-forwards.
        experts_per_token, expert_dim, num_shared_experts, renormalise_experts: see ``MixtureOfExperts``.
        has_image_router: whether image inputs have a router of their own.
        num_dense_layers: number of first blocks with dense feed-forwards; the others have experts.
        qkv_bias, out_bias: whether the projections of attention have biases.
        norm_eps: of the RMS norms.
        rope_base: of the rotary frequencies.
        max_length: the most positions of a context.
    """

    dim: int = 2048
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int | None = 4
    head_dim: int | None = None
    mlp_dim: int = 5632
    num_experts: int = 64
    experts_per_token: int = 6
    expert_dim: int = 1408
    num_shared_experts: int = 2
    renormalise_experts: bool = True
    has_image_router: bool = True
    num_dense_layers: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-5
    rope_base: float = 600000.0
    max_length: int = 32768


class BackboneBlock(nn.Module):
    """Pre-norm block of attention and a dense or expert feed-forward: (R, n, D) -> (R, n, D)."""

    def __init__(self, config: BackboneConfig, *, dense: bool):
        super().__init__()
        self.norm1, self.norm2 = (RMSNorm(config.dim, config.norm_eps) for _ in range(2))
        self.attn = Attention(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
        )
        self.mlp: SwiGLU | MixtureOfExperts
        if dense:
            self.mlp = SwiGLU(config.dim, config.mlp_dim)
        else:
            self.mlp = MixtureOfExperts(
                config.dim,
                config.expert_dim,
                config.num_experts,
                config.experts_per_token,
                num_shared_experts=config.num_shared_experts,
                renormalise=config.renormalise_experts,
                num_routers=2 if config.has_image_router else 1,
            )

    def forward(
        self, x: Tensor, mask: Tensor, rotation: Rotation, cache: LayerCache | None, images: Tensor | None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask, rotation=rotation, cache=cache)
        h = self.norm2(x)
        return x + (self.mlp(h, images) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(h))


class Backbone(nn.Module):
    """Embeddings (R, n, D) to normed hidden states (R, n, D).

    Attributes:
        dim: D.
        max_length: the most positions of a context.
        cache_sizes: layers, heads of keys and values, and channels of a head.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.blocks = ModuleList(
            BackboneBlock(config, dense=not config.num_experts or index < config.num_dense_layers)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.dim, self.max_length, attention = config.dim, config.max_length, self.blocks[0].attn
        self.cache_sizes = (config.num_layers, attention.num_kv_heads, attention.head_dim)
        places, head_dim = torch.arange(config.max_length)[:, None], attention.head_dim
        self.rotation = FixedRotation(rotation_table(places, head_dim, base=config.rope_base))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        caches: Sequence[LayerCache] | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (R, n, D) of embeddings x (R, n, D).

        Args:
            positions: (R, n) int64.
            mask: bool (R, 1, n, keys), True where attention is allowed.
            caches: one per block; None without caches.
            images: (R, n) bool, True at image inputs; None for none.
        """
        rotation = self.rotation(positions)
        each: Sequence[LayerCache | None] = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks, each, strict=True):
            x = block(x, mask, rotation, cache, images)
        return self.norm(x)


@dataclass(frozen=True)
class FlowHeadConfig:
    """The flow head that generates a latent.

    Attributes:
        dim, num_layers: width and residual blocks.
        mlp_ratio: hidden width, in units of dim, of a plain feed-forward with as many weights as the gated one has.
    """

    dim: int = 3072
    num_layers: int = 12
    mlp_ratio: float = 4.0


class FlowHead(nn.Module):
    """Rectified flow (arXiv 2209.03003) of single latents (M, C), conditioned on vectors (M, Z).

    x_t = (1 - t) latent + t noise, and the network predicts the velocity latent - noise.

    Args:
        token_dim: C.
        condition_dim: Z.
        config: the network.
    """

    def __init__(self, token_dim: int, condition_dim: int, config: FlowHeadConfig):
        super().__init__()
        self.network = DiffusionHead(
            token_dim,
            condition_dim,
            config.dim,
            config.num_layers,
            output_dim=token_dim,
            gated_dim=two_thirds(int(config.dim * config.mlp_ratio), 8),
        )
        for module in self.network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.network.initialise()

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity (M, C) of x (M, C) at times t (M,) or (1,) in [0, 1], 1 is noise, given conditions (M, Z)."""
        return self.network(x, TIME_SCALE * t, self.network.condition(condition))

    def losses(self, latents: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the velocity (M,), for latents and noise (M, C) at times t (M,)."""
        x = PATH.interpolate(latents, noise, 1 - t)
        return (self.velocity(x, t, condition) - PATH.velocity(latents, noise)).square().mean(-1)

    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        guidance: Guidance,
        *,
        num_steps: int,
        time_shift: float = 1.0,
    ) -> Tensor:
        """Sample latents (B, C) by Euler's method.

        Args:
            condition: (R * B, Z), row by row of the guidance.
            noise: (B, C), already multiplied by the temperature.
            num_steps: network calls.
            time_shift: values above 1 spend more of the steps near the noise.
        """
        projected = self.network.condition(condition)

        def field(x: Tensor, u: float) -> Tensor:
            return self.network(x, torch.full((1,), TIME_SCALE * (1 - u), device=x.device), projected)

        times = [shift_time(u, time_shift) for u in PATH.times(num_steps)]
        return last(euler(guided(field, guidance), noise, times)).x


def projection(in_dim: int, dim: int, num_layers: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(in_dim, dim)]
    for _ in range(num_layers - 1):
        layers += [nn.GELU(), nn.Linear(dim, dim)]
    return nn.Sequential(*layers)


def end_losses(logits: Tensor, wanted: int) -> Tensor:
    """Cross entropy (B,) in nats of one id under logits (B, V)."""
    return F.cross_entropy(logits.float(), torch.full_like(logits[:, 0], wanted, dtype=torch.int64), reduction="none")
