"""Which times a flow model is trained at, and how sampling schedules are warped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, Tensor)


@dataclass(frozen=True)
class TimeSampling:
    """The distribution of training times, as a map from uniform numbers to times in [0, 1].

    Attributes:
        name: ``uniform``: t = u. ``logit_normal``: t = sigmoid(mean + std z), z standard normal. ``mode``: SD3's
            sampling with heavy tails, t = 1 - u - m (cos(pi u / 2)^2 - 1 + u) (arXiv 2403.03206, section 3.1).
        mean, std: of the logit-normal distribution.
        mode_scale: m; 0 is uniform.
        stratified: sample i of a batch of B draws its uniform number from [i / B, (i + 1) / B), which lowers the
            variance of the batch mean.

    Raises:
        ValueError: std is not positive, or the mode scale makes t leave [0, 1] or fold over.
    """

    name: Literal["uniform", "logit_normal", "mode"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 0.0
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std of the logit-normal times must be positive, got {self.std}")
        limit = 2 / (math.pi - 2)
        if not -1 <= self.mode_scale <= limit:
            raise ValueError(f"mode_scale must lie in [-1, {limit:.2f}], where t is monotonic, got {self.mode_scale}")

    def __call__(self, uniforms: Tensor) -> Tensor:
        """Times (B,) of uniform numbers (B,) in [0, 1)."""
        u = uniforms
        if self.stratified:
            u = (torch.arange(len(u), device=u.device, dtype=u.dtype) + u) / len(u)
        if self.name == "logit_normal":
            return self.from_normals(torch.special.ndtri(u))
        if self.name == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
        return u

    def from_normals(self, normals: Tensor) -> Tensor:
        """Logit-normal times of standard normal numbers."""
        return torch.sigmoid(self.mean + self.std * normals)


def shift_time(t: T, shift: float) -> T:
    """t / (t + shift (1 - t)): spends more of the schedule near t = 0 for shift > 1. Keeps 0 and 1."""
    return t / (t + shift * (1 - t))
