"""Flow matching: paths between noise and data, time samplers, solvers, guidance."""

from vistok.flow.guidance import APG, Scale, guided, is_guided, scale_at
from vistok.flow.paths import LinearPath
from vistok.flow.solvers import SOLVERS, FlowState, adams_bashforth2, euler, last
from vistok.flow.stochastic import euler_maruyama, stochastic_times
from vistok.flow.times import TimeSampling, shift_time

__all__ = [
    "APG",
    "SOLVERS",
    "FlowState",
    "LinearPath",
    "Scale",
    "TimeSampling",
    "adams_bashforth2",
    "euler",
    "euler_maruyama",
    "guided",
    "is_guided",
    "last",
    "scale_at",
    "shift_time",
    "stochastic_times",
]
