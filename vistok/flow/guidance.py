"""Guidance of velocity fields."""

from __future__ import annotations

from torch import Tensor

from vistok.flow.solvers import VelocityField
from vistok.guidance import Guidance


def guided(velocity: VelocityField, guidance: Guidance) -> VelocityField:
    """The guided velocity field of one trajectory. Make a new one for every trajectory: combinations may keep state.

    Args:
        velocity: maps x (R * B, ...) to velocities (R * B, ...), row by row of the guidance, in one forward pass.
        guidance: its schedules are given the time.

    Returns:
        a field from x (B, ...) to velocities (B, ...).
    """
    combine = guidance.start()

    def field(x: Tensor, t: float) -> Tensor:
        return combine(velocity(guidance.repeat(x), t), guidance.weights(t, 1))

    return field
