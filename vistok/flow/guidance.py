"""Guidance of velocity fields: classifier-free (Ho & Salimans, arXiv 2207.12598) and adaptive projected (APG, Sadat et
al., arXiv 2410.02416)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.flow.solvers import VelocityField

Scale = float | Callable[[float], float]
"""A guidance scale: a number, or a function of the time t of a step. 1 is no guidance."""


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance: high scales without oversaturation.

    From the difference d = conditional - null of every step:

        m <- d + momentum m                  a running sum along the trajectory; a negative momentum damps it
        a = m min(1, norm_threshold / |m|)   per sample, the norm over all its elements
        b = a_orthogonal + eta a_parallel    with respect to the conditional velocity
        guided = conditional + (scale - 1) b

    Attributes:
        momentum, eta, norm_threshold: as above; norm_threshold 0 leaves the second line out.
    """

    momentum: float = -0.5
    eta: float = 0.0
    norm_threshold: float = 2.5


def is_guided(scale: Scale) -> bool:
    """Whether a scale needs null rows at all."""
    return callable(scale) or scale != 1


def scale_at(scale: Scale, t: float) -> float:
    """The scale of the step that begins at time t."""
    return float(scale(t)) if callable(scale) else scale


def guided(model: VelocityField, scale: Scale, apg: APG | None = None) -> VelocityField:
    """The guided velocity field of one trajectory.

    Args:
        model: maps x (2B, ...) to velocities (2B, ...), its first B rows conditional, the others null: both halves run
            in one forward pass.
        scale: s in ``null + s (conditional - null)``.
        apg: None is plain classifier-free guidance. The running sum belongs to the field that is returned, so make a
            new one for every trajectory.

    Returns:
        a field from x (B, ...) to velocities (B, ...).
    """
    m: Tensor | float = 0.0

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal m
        conditional, null = model(torch.cat([x, x]), t).chunk(2)
        difference = conditional - null
        if apg is None:
            return null + scale_at(scale, t) * difference
        m = difference + apg.momentum * m
        return conditional + (scale_at(scale, t) - 1) * _project(m, conditional, apg)

    return velocity


def _project(m: Tensor, conditional: Tensor, apg: APG) -> Tensor:
    """APG's b of the running sum m (B, ...)."""
    flat = m.flatten(1)
    if apg.norm_threshold > 0:
        flat = flat * (apg.norm_threshold / flat.norm(dim=1, keepdim=True)).clamp_max(1)
    # Two nearly parallel vectors cancel here, which float32 does not survive.
    wide, unit = flat.double(), F.normalize(conditional.flatten(1).double(), dim=1)
    parallel = (wide * unit).sum(1, keepdim=True) * unit
    return (wide - (1 - apg.eta) * parallel).type_as(m).view_as(m)
