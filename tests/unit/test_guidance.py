"""Guidance: schedules by their papers' formulas, rows and their weights, combinations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.conditions import PARTS, Condition
from vistok.guidance import (
    APG,
    OFF,
    ChannelNorm,
    Guidance,
    GuidanceOptions,
    at_time,
    classifier_free,
    constant,
    named,
    weighted_sum,
)
from vistok.guidance.schedules import NAMES

NUMBER = st.floats(-8, 8, width=32)


def scales(name: str, scale: float, steps: int, **arguments) -> list[float]:
    return [named(name, scale, **arguments)(step, steps) for step in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def test_schedules_divide_as_their_papers_do():
    assert scales("constant", 3.0, 3) == [3.0, 3.0, 3.0]
    assert scales("linear", 4.0, 4) == [1.0, 2.0, 3.0, 4.0]  # by steps - 1
    assert scales("linear-done", 5.0, 4) == [1.0, 2.0, 3.0, 4.0]  # by steps
    assert scales("half-linear", 5.0, 4) == [1.0, 3.0, 5.0, 5.0]  # by half of the steps
    assert scales("half-linear", 4.0, 3) == [1.0, 3.0, 4.0]
    assert scales("power-cosine", 3.0, 4) == pytest.approx([1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5)])  # by steps
    assert scales("power-cosine", 3.0, 4, power=2.0)[2] == pytest.approx(2 - math.cos(math.pi / 4))
    assert scales("power-cosine", 3.0, 4, power=0.0) == [3.0] * 4  # 0^0 is 1
    assert scales("cosine", 3.0, 3) == pytest.approx([1.0, 2.0, 3.0])


def test_schedules_of_ratios_give_the_first_token_the_whole_scale():
    off = pytest.approx(1.0001)
    assert scales("step", 2.0, 11) == [2.0, off, *[2.0] * 9]  # from the ratio 0.18 on
    assert scales("step", 2.0, 11, window=(0.25, 0.45)) == [2.0, off, off, 2.0, 2.0, *[off] * 6]
    assert scales("rectangular", 2.0, 41) == [2.0, off, *[2.0] * 39]
    assert scales("linear_ratio", 3.0, 5) == [3.0, *map(pytest.approx, [1.5001, 2.0001, 2.5001, 3.0001])]
    assert scales("linear_re", 3.0, 5) == [3.0, *map(pytest.approx, [2.5001, 2.0001, 1.5001, 1.0001])]
    assert scales("triangular", 3.0, 5) == [3.0, *map(pytest.approx, [2.0001, 3.0001, 2.0001, 1.0001])]


@given(st.sampled_from(NAMES), st.floats(0, 20), st.integers(1, 9))
def test_every_schedule_stays_between_1_and_the_scale(name, scale, steps):
    low, high = min(1, scale), max(1, scale) + 2e-4
    assert all(low - 1e-9 <= value <= high for value in scales(name, scale, steps))


def test_a_pair_rises_linearly_and_an_interval_limits_any_schedule():
    def of(**words) -> list[float]:
        guidance = GuidanceOptions(**words).guidance
        return [guidance.weights(step, 4)[0] for step in range(4)]

    assert of(guidance_scale=(1.0, 4.0)) == [1.0, 2.0, 3.0, 4.0]
    assert of(guidance_scale=(3.0, 0.0)) == [3.0, 2.0, 1.0, 0.0]
    assert of(guidance_scale=2.0, guidance_interval=(1, 3)) == [1.0, 2.0, 2.0, 1.0]
    assert of(guidance_scale=4.0, guidance_schedule="linear", guidance_interval=(2, 4)) == [1.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize("scale", [1, 1.0, (1.0, 1.0)])
def test_scale_1_is_one_row(scale):
    assert classifier_free(scale) is OFF
    assert not GuidanceOptions(guidance_scale=scale, guidance_schedule="linear").guidance.is_on
    assert classifier_free(at_time(lambda t: 1.0)).is_on


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance_scale": math.inf},
        {"guidance_scale": math.nan},
        {"guidance_scale": -0.5},
        {"guidance_scale": (1.0, math.nan)},
        {"guidance_scale": (1.0, 2.0), "guidance_schedule": "cosine"},
        {"guidance_schedule": "quadratic"},
        {"guidance_power": 2.0},
        {"guidance_power": math.nan, "guidance_schedule": "power-cosine"},
        {"guidance_power": -1.0, "guidance_schedule": "power-cosine"},
        {"guidance_window": (0.1, 0.5)},
        {"guidance_window": (0.5, 0.1), "guidance_schedule": "step"},
    ],
)
def test_words_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GuidanceOptions(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@given(st.lists(NUMBER, min_size=1, max_size=3), st.data())
def test_rows_are_combined_by_the_scales_of_neighbours(values, data):
    given_scales = data.draw(st.lists(NUMBER, min_size=2, max_size=2))
    guidance = Guidance(((), ("labels",), PARTS), tuple(map(constant, given_scales)))
    r0, r1, r2 = (torch.tensor([value], dtype=torch.float64) for value in (*values, 1.5, -2.0)[:3])
    expected = r2 + given_scales[1] * (r1 - r2) + given_scales[0] * (r0 - r1)
    weights = guidance.weights(0, 1)
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(guidance.combine(torch.cat([r0, r1, r2]), weights), expected)
    torch.testing.assert_close(
        guidance.combine(torch.cat([r0, r1, r2]), torch.tensor(weights, dtype=torch.float64)), expected
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_row_of_weight_1_is_that_row_to_the_last_bit_whatever_the_others_hold(count, on_device):
    rows = [torch.randn(7) / 3 for _ in range(count)]
    for chosen in range(count):
        weights = [float(i == chosen) for i in range(count)]
        others = [row if i == chosen else torch.full_like(row, torch.inf) for i, row in enumerate(rows)]
        combined = weighted_sum(others, torch.tensor(weights) if on_device else weights)
        assert torch.equal(combined, rows[chosen])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_row_of_weight_0_does_not_count(idle, on_device):
    weights = [3.0, -2.0]
    weights.insert(idle, 0.0)
    rows = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    expected = sum(weight * row for weight, row in zip(weights, rows))
    rows[idle] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0, 1], dtype=torch.float64)
    given_weights = torch.tensor(weights, dtype=torch.float64) if on_device else weights
    torch.testing.assert_close(weighted_sum(rows, given_weights), expected)


def test_rows_drop_parts_of_the_condition():
    condition = Condition.together(Condition.from_labels([3, 5]), Condition.from_ids(torch.tensor([[1, 2], [3, 4]])))
    guidance = Guidance(((), ("ids",), ("ids", "labels")), (constant(2.0), constant(3.0)))
    rows = guidance.conditions(condition)
    assert rows.labels.tolist() == [3, 5, 3, 5, 3, 5]
    assert rows.dropped_of("ids").tolist() == [False, False, True, True, True, True]
    assert rows.dropped_of("labels").tolist() == [False, False, False, False, True, True]
    assert classifier_free(2.0).conditions(condition).dropped.tolist() == [False, False, True, True]
    assert OFF.conditions(condition) is condition
    with pytest.raises(ValueError, match="'text' is no part of a condition"):
        Guidance(((), ("text",)), (constant(2.0),)).conditions(condition)
    with pytest.raises(ValueError, match="3 rows take 2 scales, got 1"):
        Guidance(((), ("ids",), PARTS), (constant(2.0),))


def test_one_step_of_a_guidance_is_a_guidance():
    guidance = GuidanceOptions(guidance_scale=4.0, guidance_schedule="linear").guidance
    assert guidance.at(2, 4).weights(0.3, 1) == guidance.weights(2, 4) == (3.0, -2.0)


# ---------------------------------------------------------------------------------------------------------------------
# Other combinations


def test_channel_norm_keeps_the_length_of_the_conditional_row():
    rows = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])]
    guidance = classifier_free(2.0, combination=ChannelNorm())
    torch.testing.assert_close(guidance.combine(torch.cat(rows), guidance.weights(0, 1)), rows[0])
    shorter = classifier_free(0.5, combination=ChannelNorm())
    torch.testing.assert_close(shorter.combine(torch.cat(rows), shorter.weights(0, 1)), rows[0] / 2)
    first = ChannelNorm(dim=1).start()([torch.ones(2, 4, 3), -torch.ones(2, 4, 3)], (3.0, -2.0))
    torch.testing.assert_close(first, torch.ones(2, 4, 3))


def test_apg_combines_two_rows():
    with pytest.raises(ValueError, match="got 3 rows"):
        APG().start()([torch.ones(1, 2)] * 3, (1.0, 0.0, 0.0))
