"""Flow matching: paths between noise and data, time samplers, solvers, guidance."""

from vistok.flow.guidance import guided
from vistok.flow.paths import LinearPath
from vistok.flow.solvers import SOLVERS, FlowState, adams_bashforth2, euler, last
from vistok.flow.stochastic import euler_maruyama, stochastic_times
from vistok.flow.times import TimeSampling, shift_time

__all__ = [
    "SOLVERS",
    "FlowState",
    "LinearPath",
    "TimeSampling",
    "adams_bashforth2",
    "euler",
    "euler_maruyama",
    "guided",
    "last",
    "shift_time",
    "stochastic_times",
]
