"""Guidance schedules over the share of a sequence that is done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.generators.engine.ratio_schedules import OFF, RATIO_SCHEDULES, WINDOWS, ratio_scale

NAMES = ("constant", *WINDOWS, *RATIO_SCHEDULES)


@given(st.sampled_from(NAMES), st.floats(1, 20), st.integers(1, 300))
def test_the_first_token_takes_the_whole_scale_and_no_other_more(name, scale, steps):
    scales = [ratio_scale(name, scale, step, steps) for step in range(steps)]
    assert scales[0] == scale
    assert all(1 <= value <= scale + 2e-4 for value in scales)


def test_shapes():
    def scales(name: str, **options) -> list[float]:
        return [round(ratio_scale(name, 3.0, step, 5, **options), 3) for step in range(5)]

    assert scales("constant") == [3, 3, 3, 3, 3]
    assert scales("linear") == [3, 1.5, 2, 2.5, 3]
    assert scales("linear_re") == [3, 2.5, 2, 1.5, 1]
    assert scales("triangular") == [3, 2, 3, 2, 1]
    assert scales("step") == [3, 3, 3, 3, 3]
    assert scales("step", window=(0.6, 1.0)) == [3, 1, 1, 3, 3]
    assert scales("rectangular", window=(0.3, 0.8)) == [3, 1, 3, 3, 1]
    assert ratio_scale("step", 3.0, 1, 10) == OFF


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"'cosine'; there are constant, step"):
        ratio_scale("cosine", 2.0, 0, 4)
    with pytest.raises(ValueError, match=r"0\.\.3, got 4"):
        ratio_scale("linear", 2.0, 4, 4)
