"""How the outputs of guidance's rows are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Sequence[float] | Tensor
"""One weight per row, with sum 1. A tensor (R, ...) must broadcast with the rows; the host does not read it."""

Combine = Callable[[Sequence[Tensor], Weights], Tensor]
"""(outputs (B, ...) of each row, weights) -> combined output (B, ...)."""


class Combination(Protocol):
    """A way of combining rows."""

    def start(self) -> Combine:
        """The combining function for one trajectory; it may keep state between steps."""


def weighted_sum(rows: Sequence[Tensor], weights: Weights) -> Tensor:
    """last + sum of weight * (row - last).

    A row of weight 0 is left out, so its infinities do no harm. If all other rows have weight 0, a row of weight 1 is
    returned bit for bit.
    """
    if isinstance(weights, Tensor):
        return _weighted_sum_on_device(rows, weights)
    (*others, (last, _)) = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight != 0]
    out = last
    for row, weight in others:
        out = out + weight * (row - last)
    return out


def _weighted_sum_on_device(rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    counts = weights != 0
    last = rows[0]
    for i in range(1, len(rows)):
        last = torch.where(counts[i], rows[i], last)
    out = last
    for i, row in enumerate(rows[:-1]):
        is_other = counts[i] & counts[i + 1 :].any(0)
        out = torch.where(is_other, out + weights[i] * (row - last), out)
    return out


@dataclass(frozen=True)
class WeightedSum:
    """The plain combination: ``weighted_sum``."""

    def start(self) -> Combine:
        return weighted_sum


PLAIN = WeightedSum()


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416) of two rows: high scales without oversaturation.

    From the difference d = conditional - null of every step:

        m <- d + momentum m                  a running sum along the trajectory; a negative momentum damps it
        a = m min(1, norm_threshold / |m|)   per sample, the norm over all its elements
        b = a_orthogonal + eta a_parallel    with respect to the conditional output
        guided = conditional + (scale - 1) b

    Attributes:
        momentum, eta, norm_threshold: as above; norm_threshold 0 leaves the second line out.
    """

    momentum: float = -0.5
    eta: float = 0.0
    norm_threshold: float = 2.5

    def start(self) -> Combine:
        m: Tensor | float = 0.0

        def combine(rows: Sequence[Tensor], weights: Weights) -> Tensor:
            nonlocal m
            if len(rows) != 2:
                raise ValueError(f"APG combines a conditional and a null row, got {len(rows)} rows")
            conditional, null = rows
            m = (conditional - null) + self.momentum * m
            return conditional + (weights[0] - 1) * self._project(m, conditional)

        return combine

    def _project(self, m: Tensor, conditional: Tensor) -> Tensor:
        """b of the running sum m (B, ...)."""
        flat = m.flatten(1)
        if self.norm_threshold > 0:
            flat = flat * (self.norm_threshold / flat.norm(dim=1, keepdim=True)).clamp_max(1)
        # In float64: subtracting nearly parallel vectors loses too much precision in float32.
        wide, unit = flat.double(), F.normalize(conditional.flatten(1).double(), dim=1)
        parallel = (wide * unit).sum(1, keepdim=True) * unit
        return (wide - (1 - self.eta) * parallel).type_as(m).view_as(m)


@dataclass(frozen=True)
class ChannelNorm:
    """The weighted sum, scaled down where its norm over channels exceeds the conditional row's: times
    min(1, |conditional| / |sum| + eps) (Ming-UniVision, arXiv 2510.06590).

    Attributes:
        dim: the axis of channels.
        eps: as above.
    """

    dim: int = -1
    eps: float = 1e-8

    def start(self) -> Combine:
        def combine(rows: Sequence[Tensor], weights: Weights) -> Tensor:
            guided = weighted_sum(rows, weights)
            norms = [values.norm(dim=self.dim, keepdim=True) for values in (rows[0], guided)]
            return guided * (norms[0] / norms[1] + self.eps).clamp(0, 1)

        return combine
