"""Paths from noise to data (flow matching: Lipman et al., arXiv 2210.02747; rectified flow: Liu et al., 2209.03003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from vistok.utils.steps import check_steps


class Velocity(NamedTuple):
    """The prediction of a network for noisy pixels or latents: a velocity (B, C, H, W), and patch features (B, P, D)
    for the alignment with a teacher, or None."""

    velocity: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class LinearPath:
    """The straight path between data and noise, run in either direction of time.

    With s = t where ``noise_at`` is 1 and s = 1 - t where it is 0:

        x_t = (1 - s) data + s noise,        velocity dx/dt = +-(noise - data), + where ``noise_at`` is 1.

    The velocity is constant along a path, so one evaluation extrapolates to the data.

    Attributes:
        noise_at: the time of pure noise: 1 (FlexTok, xAR, SD3) or 0 (D-AR).
    """

    noise_at: Literal[0, 1] = 1

    @property
    def data_at(self) -> int:
        """The time of clean data."""
        return 1 - self.noise_at

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t of data and noise (B, ...) at times t, a number or (B,)."""
        share = _per_sample(t if self.noise_at == 1 else 1 - t, data)
        return (1 - share) * data + share * noise

    def velocity(self, data: Tensor, noise: Tensor) -> Tensor:
        """dx/dt, the target of a velocity network."""
        return noise - data if self.noise_at == 1 else data - noise

    def data_estimate(self, x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """Where the straight line from x at time t (a number or (B,)) along ``velocity`` meets the data end."""
        return x + _per_sample(self.data_at - t, x) * velocity

    def times(self, num_steps: int) -> list[float]:
        """The ``num_steps`` + 1 evenly spaced times from noise to data.

        Raises:
            ValueError: num_steps is not a positive integer, or more than ``MOST_STEPS``.
        """
        check_steps("num_steps", num_steps)
        rising = [i / num_steps for i in range(num_steps + 1)]
        return rising if self.noise_at == 0 else rising[::-1]


def _per_sample(t: Tensor | float, like: Tensor) -> Tensor | float:
    """Times (B,) with as many axes as ``like``, so that they broadcast over each sample."""
    return t.view(-1, *[1] * (like.ndim - 1)) if isinstance(t, Tensor) and t.ndim else t
