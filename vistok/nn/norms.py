"""Normalisation layers that torch does not have, or has with other numerics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) as in Llama: in float32, cast back, then times the weight."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight  # float32 inside, whatever x is


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift come from a style map: (B, C, h, w) -> (B, C, h, w), or (B, C, t, h, w) -> same.

    The output is norm(x) * scale + shift, with scale = gamma(sqrt(var + eps)) and shift = beta(mean): mean and unbiased
    variance of each channel of the style over its positions.

    Args:
        channels: C.
        style_channels: channels S of the style (B, S, h', w').
        groups: groups of the norm, which has no weights of its own; must divide C.
        eps: of the norm and of the standard deviation.
    """

    def __init__(self, channels: int, style_channels: int, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.gamma, self.beta = (nn.Linear(style_channels, channels) for _ in range(2))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        variance, mean = torch.var_mean(style.flatten(2), 2, correction=1)  # (B, S)
        scale, shift = self.gamma((variance + self.eps).sqrt()), self.beta(mean)  # (B, C)
        scale, shift = (y.view(*y.shape, *[1] * (x.ndim - 2)) for y in (scale, shift))
        return F.group_norm(x, self.groups, eps=self.eps) * scale + shift
