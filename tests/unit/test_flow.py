"""Flow matching: paths, times, solvers, guidance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.conditions import PARTS
from vistok.flow import (
    SOLVERS,
    LinearPath,
    TimeSampling,
    adams_bashforth2,
    euler,
    guided,
    last,
    shift_time,
)
from vistok.guidance import APG, Guidance, at_time, classifier_free, constant

PATHS = [LinearPath(noise_at=0), LinearPath(noise_at=1)]


def pair(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 4, 4, generator=generator), torch.randn(batch, 2, 4, 4, generator=generator)


@pytest.mark.parametrize("path", PATHS)
def test_path_joins_noise_and_data_with_the_velocity_as_slope(path):
    data, noise = pair()
    ends = [path.interpolate(data, noise, torch.full((3,), float(t))) for t in (path.noise_at, path.data_at)]
    torch.testing.assert_close(ends, [noise, data])
    early, late = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.3, 0.5, 0.7])
    slope = (path.interpolate(data, noise, late) - path.interpolate(data, noise, early)) / 0.1
    torch.testing.assert_close(slope, path.velocity(data, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_one_velocity_extrapolates_to_the_data(path):
    data, noise = pair()
    t = torch.tensor([0.1, 0.5, 0.9])
    x, velocity = path.interpolate(data, noise, t), path.velocity(data, noise)
    torch.testing.assert_close(path.data_estimate(x, velocity, t), data)
    torch.testing.assert_close(path.data_estimate(x[:1], velocity[:1], 0.1), data[:1])


@pytest.mark.parametrize("path", PATHS)
def test_times_run_from_noise_to_data(path):
    times = path.times(4)
    assert (times[0], times[-1]) == (path.noise_at, path.data_at)
    assert len(times) == 5


@pytest.mark.parametrize("num_steps", [0, -1, None, 2.5, True])
def test_step_counts_that_are_none_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be an integer of at least 1, got {num_steps}"):
        LinearPath().times(num_steps)


@given(st.floats(-1, 2 / (math.pi - 2)))
def test_mode_sampling_keeps_order_and_range(scale):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = TimeSampling("mode", mode_scale=scale)(u)
    assert bool((t.diff() <= 1e-12).all())  # falling: u = 0 is t = 1
    torch.testing.assert_close(t[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_logit_normal_times_have_the_quantiles_of_their_definition():
    sampling = TimeSampling("logit_normal", mean=0.5, std=2.0)
    u = torch.tensor([0.5, 0.8413447])  # the median, and one deviation above it
    torch.testing.assert_close(sampling(u), torch.sigmoid(torch.tensor([0.5, 2.5])))
    torch.testing.assert_close(sampling(u), sampling.from_normals(torch.tensor([0.0, 1.0])))


@given(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=8))
def test_stratified_times_fill_every_stratum(uniforms):
    t = TimeSampling("uniform", stratified=True)(torch.tensor(uniforms, dtype=torch.float64))
    assert (t * len(uniforms)).floor().tolist() == list(range(len(uniforms)))


@pytest.mark.parametrize(("arguments", "message"), [({"std": 0.0}, "std"), ({"mode_scale": 2.0}, "mode_scale")])
def test_distributions_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimeSampling("mode", **arguments)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shifted_times_keep_range_and_invert(t, shift):
    shifted = shift_time(t, shift)
    assert 0 <= shifted <= 1
    assert shift_time(shifted, 1 / shift) == pytest.approx(t, abs=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@given(num_steps=st.integers(1, 6))
@settings(max_examples=5)
def test_solvers_are_exact_on_straight_lines(solver, path, num_steps):
    data, noise = pair()
    state = last(solver(lambda x, t: path.velocity(data, noise), noise, path.times(num_steps)))
    torch.testing.assert_close(state.x, data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (adams_bashforth2, 2)])
def test_error_falls_with_the_order_of_the_solver(solver, order):
    start = torch.ones(1, 1, dtype=torch.float64)

    def error(num_steps: int) -> float:
        times = LinearPath(noise_at=0).times(num_steps)
        return abs(last(solver(lambda x, t: -x * (1 + t), start, times)).x.item() - math.exp(-1.5))

    assert error(64) / error(128) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_states_carry_the_direction_of_their_step(solver):
    path, times = LinearPath(noise_at=0), [0.0, 0.1, 0.3, 1.0]
    x = start = torch.ones(2, 3)
    for t, state in zip(times, solver(lambda x, t: x * (1 + t), start, times)):
        torch.testing.assert_close(state.x, x + (state.t - t) * state.velocity)
        # The data estimate is the end of a step to t = 1.
        torch.testing.assert_close(path.data_estimate(state.x, state.velocity, state.t), x + (1 - t) * state.velocity)
        x = state.x


def two_rows(x: torch.Tensor, t: float) -> torch.Tensor:
    """Conditional velocity x + t, null velocity -x."""
    conditional, null = x.chunk(2)
    return torch.cat([conditional + t, -null])


@given(st.floats(0, 10))
def test_guidance_extrapolates_from_the_null_row(scale):
    x = torch.randn(2, 3)
    torch.testing.assert_close(
        guided(two_rows, Guidance(((), PARTS), (constant(scale),)))(x, 0.5), -x + scale * (2 * x + 0.5)
    )
    torch.testing.assert_close(
        guided(two_rows, classifier_free(at_time(lambda t: scale * t)))(x, 0.5), -x + scale / 2 * (2 * x + 0.5)
    )


def test_scale_1_is_no_guidance():
    x = torch.randn(2, 3)
    assert torch.equal(guided(lambda x, t: x + t, classifier_free(1.0))(x, 0.5), x + 0.5)
    assert torch.equal(guided(two_rows, classifier_free(at_time(lambda t: 1.0)))(x, 0.5), x + 0.5)
    apg = classifier_free(at_time(lambda t: 1.0), combination=APG())
    torch.testing.assert_close(guided(two_rows, apg)(x, 0.5), x + 0.5)


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_three_rows_equal_three_passes(first, second):
    passes = [lambda x, t: x + t, lambda x, t: x * t, lambda x, t: -x]

    def three_rows(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.cat([one(part, t) for one, part in zip(passes, x.chunk(3))])

    x = torch.randn(2, 3, dtype=torch.float64)
    field = guided(three_rows, Guidance(((), PARTS, PARTS), (constant(first), at_time(lambda t: second * t))))
    weights = first, second / 2 - first, 1 - second / 2
    torch.testing.assert_close(field(x, 0.5), sum(w * one(x, 0.5) for w, one in zip(weights, passes)))


def test_apg_adds_a_short_vector_across_the_conditional_velocity():
    generator = torch.Generator().manual_seed(0)
    conditional, null = (10 * torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    added = (
        guided(lambda x, t: torch.cat([conditional, null]), classifier_free(2.0, combination=APG()))(conditional, 0.5)
        - conditional
    )
    assert (added.flatten(1).norm(dim=1) <= 2.5 + 1e-4).all()
    torch.testing.assert_close((added * conditional).flatten(1).sum(1), torch.zeros(2), rtol=0, atol=1e-3)
    # Without its three changes it is plain guidance.
    plain = guided(
        lambda x, t: torch.cat([conditional, null]),
        classifier_free(2.0, combination=APG(momentum=0, eta=1, norm_threshold=0)),
    )
    torch.testing.assert_close(plain(conditional, 0.5), 2 * conditional - null)


def test_apg_remembers_within_a_trajectory_only():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    field = guided(two_rows, classifier_free(3.0, combination=APG(momentum=-0.5)))
    first, second = field(x, 0.5), field(x, 0.5)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(guided(two_rows, classifier_free(3.0, combination=APG(momentum=-0.5)))(x, 0.5), first)
