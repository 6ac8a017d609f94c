"""Sampling a straight path as a stochastic process: the reverse SDE whose marginals are those of the flow's ODE.

With noise at t = 1, x_t = (1 - t) data + t noise, and velocity v, the score is -(x + (1 - t) v) / t. A diffusion
g^2 = 2t then gives the drift v - g^2 / 2 score = (2 - t) v + x (Song et al., arXiv 2011.13456, applied to flow matching
as in SiT, arXiv 2401.08740; this choice of g is that of xAR, arXiv 2502.20388).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from vistok.flow.solvers import FlowState, VelocityField
from vistok.utils.steps import check_steps

LAST_TIME = 0.04
"""The time at which the last step begins; it goes to t = 0 without noise, because the score is stiff there."""


def stochastic_times(num_steps: int) -> list[float]:
    """The num_steps + 1 times that ``euler_maruyama`` visits: evenly from 1 to 0.04, then 0.

    Raises:
        ValueError: fewer than two steps (the last adds no noise), or more than ``MOST_STEPS``.
    """
    check_steps("num_steps", num_steps)
    if num_steps < 2:
        raise ValueError(
            f"num_steps must be at least 2 for the stochastic solver (the last step adds no noise), got {num_steps}; "
            "take more, or solver='euler'"
        )
    width = (1 - LAST_TIME) / (num_steps - 1)
    return [1 - i * width for i in range(num_steps - 1)] + [LAST_TIME, 0.0]


def euler_maruyama(
    velocity: VelocityField, x: Tensor, times: Sequence[float], noise: Sequence[Tensor]
) -> Iterator[FlowState]:
    """The Euler-Maruyama method on the reverse SDE: x <- x + ((2 - t) v + x) dt + sqrt(2t |dt|) noise.

    Args:
        times: falling, from pure noise at 1; the last step is taken without noise.
        noise: standard normal, like x, one for each step but the last.

    Yields:
        a state per step, with the network's velocity.
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        v, width = velocity(x, t), t_next - t
        x = x + ((2 - t) * v + x) * width
        if step < len(times) - 2:
            x = x + math.sqrt(2 * t * -width) * noise[step]
        yield FlowState(t_next, x, v)
