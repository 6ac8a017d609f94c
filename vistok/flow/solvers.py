"""Solvers of dx/dt = v(x, t) as iterators: tests, previews and progress bars watch the trajectory as it grows.

Every solver takes a velocity field, the starting point and the times to visit (the first is that of the starting
point; they may rise or fall and need not be evenly spaced), and yields one ``FlowState`` per step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

from torch import Tensor

State = TypeVar("State")
VelocityField = Callable[[Tensor, float], Tensor]
"""v(x, t): the velocity of all samples x (B, ...) at one time t."""


class FlowState(NamedTuple):
    """A trajectory after a step.

    Attributes:
        t: the time reached.
        x: the samples there, (B, ...).
        velocity: the direction of the step that led there; for a multistep method, its combination of velocities.
            ``path.data_estimate(x, velocity, t)`` extends that straight step to the data: a preview without another
            network call.
    """

    t: float
    x: Tensor
    velocity: Tensor


def euler(velocity: VelocityField, x: Tensor, times: Sequence[float]) -> Iterator[FlowState]:
    """Euler's method: x_{i+1} = x_i + (t_{i+1} - t_i) v(x_i, t_i)."""
    for t, t_next in pairwise(times):
        direction = velocity(x, t)
        x = x + (t_next - t) * direction
        yield FlowState(t_next, x, direction)


def adams_bashforth2(velocity: VelocityField, x: Tensor, times: Sequence[float]) -> Iterator[FlowState]:
    """Two-step Adams-Bashforth: x_{i+1} = x_i + (t_{i+1} - t_i) (3/2 v_i - 1/2 v_{i-1}), the first step Euler's.

    The coefficients are those of even steps even if the times are uneven, as in the evaluation of D-AR
    (arXiv 2505.23660).
    """
    previous = None
    for t, t_next in pairwise(times):
        current = velocity(x, t)
        direction = current if previous is None else 1.5 * current - 0.5 * previous
        previous = current
        x = x + (t_next - t) * direction
        yield FlowState(t_next, x, direction)


def last(trajectory: Iterator[State]) -> State:
    """Run a trajectory to its end and return its last state."""
    (state,) = deque(trajectory, maxlen=1)
    return state


SOLVERS = {"euler": euler, "adams_bashforth2": adams_bashforth2}
