"""Embeddings of the time of a flow or diffusion model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vistok.nn.containers import Sequential


def timestep_features(t: Tensor, dim: int, *, scale: float = 1.0, base: float = 10000.0) -> Tensor:
    """Times (B,) to [cos(t f), sin(t f)] (B, dim), float32, with frequencies f_k = scale base^(-k / (dim / 2)).

    Raises:
        ValueError: an odd ``dim``.
    """
    if dim % 2:
        raise ValueError(f"time features need an even number of features, got {dim}")
    half = dim // 2
    # Phases reach hundreds of radians, where rounding shows: the order of operations is that of the references.
    frequencies = torch.exp(-math.log(base) * torch.arange(half, dtype=torch.float32, device=t.device) / half) * scale
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimestepEmbedding(nn.Module):
    """Times (B,) to (B, D): cosine and sine features, linear, SiLU, linear.

    Args:
        dim: width D.
        frequency_dim: number of features.
        scale, base: of the frequencies, see ``timestep_features``.
    """

    def __init__(self, dim: int, frequency_dim: int, *, scale: float = 1.0, base: float = 10000.0):
        super().__init__()
        self.frequency_dim, self.scale, self.base = frequency_dim, scale, base
        self.mlp = Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.frequency_dim, scale=self.scale, base=self.base)
        return self.mlp(features.to(self.mlp[0].weight.dtype))
