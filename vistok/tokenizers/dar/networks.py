"""The networks of D-AR (arXiv 2505.23660): gated transformer blocks, and the velocity network in pixel space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.flow.paths import Velocity
from vistok.nn.alignment import AlignmentConfig, AlignmentHead
from vistok.nn.attention import Attention, CrossAttention
from vistok.nn.containers import ModuleList
from vistok.nn.mlp import MLP
from vistok.nn.modulation import modulate
from vistok.nn.rotary import FixedRotation, Rotation, grid_positions, rotation_table
from vistok.nn.timesteps import TimestepEmbedding

HEAD_DIM = 64
RELEASED_WIDTH = 768
ROPE_BASE = 10000.0
ALIGNED_GRID = 16  # patches per side of the frozen encoder's raster, to which features are pooled
layer_norm = partial(nn.LayerNorm, eps=1e-6)
plain_norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)


def heads_of(dim: int) -> int:
    """The number of heads of 64 channels in a width; ValueError if 64 does not divide it."""
    if dim % HEAD_DIM:
        raise ValueError(f"D-AR's heads have {HEAD_DIM} channels: widths must be multiples of that, got {dim}")
    return dim // HEAD_DIM


class GridRotation(nn.Module):
    """Rotary tables of a raster, with half of the channels for rows and half for columns, followed by ``extra``
    positions without rotation. The table of ``grid`` is stored; those of other grids are computed on demand."""

    def __init__(self, grid: tuple[int, int], extra: int = 0, *, base: float = ROPE_BASE):
        super().__init__()
        self.grid, self.extra, self.base = grid, extra, base
        self.table = FixedRotation(self._make(grid))

    def _make(self, grid: tuple[int, int]) -> Rotation:
        still = torch.zeros(self.extra, 2, dtype=torch.int64)
        return rotation_table(torch.cat([grid_positions(grid), still]), HEAD_DIM, base=self.base)

    def forward(self, grid: tuple[int, int]) -> Rotation:
        if grid == self.grid:
            return self.table(slice(0, grid[0] * grid[1] + self.extra))
        return Rotation(*(part.to(self.table.cos.device) for part in self._make(grid)))


class DARBlock(nn.Module):
    """Pre-norm transformer block with learned per-channel gates, ``gate_init`` at first: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, gate_init: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn = Attention(dim, heads_of(dim), qk_norm=layer_norm)
        self.mlp = MLP(dim, 4 * dim, F.silu)
        self.gate1, self.gate2 = (nn.Parameter(torch.full((dim,), gate_init)) for _ in range(2))
        _initialise(self, dim)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False, rotation: Rotation | None = None
    ) -> Tensor:
        x = x + self.gate1 * self.attn(self.norm1(x), mask=mask, causal=causal, rotation=rotation)
        return x + self.gate2 * self.mlp(self.norm2(x))


class GridPositions(nn.Module):
    """Learned positions (P, D) of a raster, interpolated for other rasters."""

    def __init__(self, grid: tuple[int, int], dim: int):
        super().__init__()
        # On the scale of the patches, and independent: sine tables are smooth and hardly differ over few patches.
        self.table = nn.Parameter(0.7 * torch.randn(dim, *grid))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        table: Tensor = self.table
        if grid != table.shape[1:]:
            table = F.interpolate(table[None], grid, mode="bilinear", antialias=True)[0]
        return rearrange(table, "d h w -> (h w) d")


@dataclass(frozen=True)
class VelocityConfig:
    """Config of the velocity network.

    Attributes:
        dim, num_layers: width and number of blocks.
        patch_size: side of a pixel patch.
        share_time_embedding: one time embedding for all blocks, instead of one each.
        modulated_output: adaptive norm before the output too; needs a shared time embedding.
        rope_base: of the patches' rotary positions.
    """

    dim: int = 768
    num_layers: int = 12
    patch_size: int = 8
    share_time_embedding: bool = False
    modulated_output: bool = False
    rope_base: float = ROPE_BASE

    def __post_init__(self) -> None:
        if self.modulated_output and not self.share_time_embedding:
            raise ValueError("modulated_output needs share_time_embedding: there is no other time to modulate by")


class VelocityBlock(nn.Module):
    """Self-attention and feed-forward of patches (B, P, D), modulated patch by patch.

    Time and tokens enter only through the modulation: each patch attends to the tokens; shifts, scales and gates are
    computed from the result plus the time embedding.
    """

    def __init__(self, config: VelocityConfig):
        super().__init__()
        dim = config.dim
        self.norm = plain_norm(dim)
        self.cond_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cross_attn = CrossAttention(dim, heads_of(dim), qk_norm=layer_norm)
        self.attn = Attention(dim, heads_of(dim), qk_norm=layer_norm)
        self.mlp = MLP(dim, 4 * dim, F.silu)
        self.time_embedding = None if config.share_time_embedding else time_embedding(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        _initialise(self, dim)
        nn.init.zeros_(self.modulation.weight)

    def forward(
        self, x: Tensor, t: Tensor, shared_time: Tensor | None, condition: Tensor, rotation: Rotation
    ) -> Tensor:
        time = cast(Tensor, shared_time) if self.time_embedding is None else self.time_embedding(t * 1000)
        context = self.norm(self.cond_embed(condition))
        seen = self.cross_attn(self.norm(x), context, rotation=rotation)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time[:, None] + seen)).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm(x), shift1, scale1), rotation=rotation)
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))


class VelocityNetwork(nn.Module):
    """The velocity of noisy pixels (B, C, H, W), given a group of embedded tokens (B, Q, Dc).

    Args:
        config: the network.
        in_channels: C.
        cond_dim: Dc.
        grid: (h, w) patches of an image of the usual size; other sizes work too.
        alignment: the training-only head, on the input of block ``layer``, counted from 0; None has no head.
        absolute_positions: add learned positions to the patches.
    """

    def __init__(
        self,
        config: VelocityConfig,
        in_channels: int,
        cond_dim: int,
        grid: tuple[int, int],
        alignment: AlignmentConfig | None = None,
        *,
        absolute_positions: bool = False,
    ):
        super().__init__()
        dim, self.patch = config.dim, config.patch_size
        self.cond_proj, self.norm = nn.Linear(cond_dim, dim), plain_norm(dim)
        self.patches_in = nn.Linear(in_channels * self.patch**2, dim)
        self.positions = GridPositions(grid, dim) if absolute_positions else None
        self.rotation = GridRotation(grid, base=config.rope_base)
        self.time_embedding = time_embedding(dim) if config.share_time_embedding else None
        self.blocks = ModuleList(VelocityBlock(config) for _ in range(config.num_layers))
        self.modulation = nn.Linear(dim, 2 * dim) if config.modulated_output else None
        self.patches_out = nn.Linear(dim, in_channels * self.patch**2)
        for module in (self.patches_out, self.modulation):
            if module is not None:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.alignment = alignment
        self.alignment_layer = None
        if alignment is not None:
            self.alignment_layer = alignment.tap(range(config.num_layers))
            self.alignment_head = AlignmentHead.of(dim, alignment)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor, *, align: bool = False) -> Velocity:
        """The velocity, data - noise, at noisy pixels (B, C, H, W) and times (B,), or (1,) for all; time 0 is noise.

        Args:
            align: compute the features for alignment too.
        """
        grid = (noisy.shape[2] // self.patch, noisy.shape[3] // self.patch)
        rotation, condition = self.rotation(grid), self.norm(self.cond_proj(tokens))
        pixels = {"h": grid[0], "p": self.patch, "q": self.patch}
        x = self.patches_in(rearrange(noisy, "b c (h p) (w q) -> b (h w) (c p q)", **pixels))
        x = x if self.positions is None else x + self.positions(grid)
        shared_time = None if self.time_embedding is None else self.time_embedding(t * 1000)
        aligned = None
        for index, block in enumerate(self.blocks):
            if align and index == self.alignment_layer:
                aligned = self.alignment_head(_pooled(x, grid))
            x = block(x, t, shared_time, condition, rotation)
        x = self.norm(x)
        if self.modulation is not None:
            shift, scale = self.modulation(F.silu(cast(Tensor, shared_time)))[:, None].chunk(2, -1)
            x = modulate(x, shift, scale)
        out = self.patches_out(x)
        return Velocity(rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", **pixels), aligned)


def time_embedding(dim: int) -> TimestepEmbedding:
    """An embedding of times in thousandths, 0 to 1000."""
    return TimestepEmbedding(dim, dim)


def _pooled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, P, D) averaged to a raster of 16 per side; smaller rasters are left as they are."""
    kernel = max(grid[0] // ALIGNED_GRID, 1)
    maps = F.avg_pool2d(rearrange(x, "b (h w) d -> b d h w", h=grid[0]), kernel)
    return rearrange(maps, "b d h w -> b (h w) d")


def _initialise(module: nn.Module, dim: int) -> None:
    """Initialise linear layers with standard deviation 0.02 at the released width, and at other widths such that the
    signal keeps its scale. At 128 channels, 0.02 would shrink the signal in every layer, and the velocity would not
    depend on the tokens until late in training."""
    std = 0.02 * math.sqrt(RELEASED_WIDTH / dim)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
