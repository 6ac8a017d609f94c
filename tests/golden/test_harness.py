"""The harness itself: wrong answers fail, steps without a runner fail, and correct answers pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from . import harness
from .harness import Case, GoldenFailure, fill, find_cases, run_step, take_slice

MODEL = "harness/model"


@pytest.fixture
def registry(monkeypatch):
    """Registers runners for one test."""
    monkeypatch.setattr(harness, "_runners", {})
    monkeypatch.setattr(harness, "_quirk_checks", {})
    return harness


def make_case(folder: Path, tensors: dict[str, torch.Tensor], model: str = MODEL, **parts) -> Case:
    """Write and open a case with the given parts; ``step`` is its only step."""
    step = {"op": "double", "args": {}, "inputs": ["x"], "outputs": ["y"], "tol": 1e-3} | parts.pop("step", {})
    description = {"model": model, "config": {}, "state": {}, "steps": [step]} | parts
    folder.mkdir(exist_ok=True)
    (folder / "case.json").write_text(json.dumps(description))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")
    return Case(folder)


def run(case: Case, answer) -> None:
    """Run the case's step with a runner that gives ``answer`` as "y"."""
    harness.runner(MODEL, "double")(lambda case, step: {"y": answer})
    run_step(case, case.steps[0])


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_right_answer_passes_and_wrong_one_names_the_place(registry, tmp_path):
    case = make_case(tmp_path / "c", {"in/x": X, "out/y": 2 * X})
    registry.runner(MODEL, "double")(lambda case, step: step.answers(2 * step.tensor("x", 0)))
    run_step(case, case.steps[0])
    registry._runners[MODEL, "double"] = lambda case, step: {"y": 2 * X + torch.tensor([[0, 0], [0.1, 0]])}
    with pytest.raises(GoldenFailure, match=r"c/0-double: y: 1 of 4 values differ, worst at \(1, 0\)"):
        run_step(case, case.steps[0])


@pytest.mark.parametrize("answer", [X + 2e-3, X[0], X * torch.nan, X.flatten()])
def test_float_answers_fail(registry, tmp_path, answer):
    with pytest.raises(GoldenFailure):
        run(make_case(tmp_path / "c", {"out/y": X}), answer)


def test_nan_and_inf_must_be_where_the_answer_has_them(registry, tmp_path):
    expected = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    case = make_case(tmp_path / "c", {"out/y": expected})
    run(case, expected.clone())
    registry._runners.clear()
    with pytest.raises(GoldenFailure, match="2 of 4"):
        run(case, torch.tensor([torch.nan, -torch.inf, -torch.inf, torch.nan]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_are_exact_whatever_the_tolerance(registry, tmp_path, dtype):
    ids = torch.tensor([3, 1, 2], dtype=dtype)
    case = make_case(tmp_path / "c", {"out/y": ids}, step={"tol": 10, "args": {"compare": {"y": 10}}})
    run(case, ids.to(torch.int64))
    for wrong in (ids + 1, ids.float()):
        registry._runners.clear()
        with pytest.raises(GoldenFailure):
            run(case, wrong)


@pytest.mark.parametrize(("got", "expected"), [((), (1,)), ((1,), ())])
def test_scalar_and_vector_of_one_are_the_same(registry, tmp_path, got, expected):
    run(make_case(tmp_path / "c", {"out/y": torch.ones(expected)}), torch.ones(got))


@pytest.mark.parametrize(
    ("compare", "error", "passes"),
    [
        (None, [0.0, 0.0009], True),
        (None, [0.0, 0.0011], False),
        ("max", [0.0, 0.09], True),  # 1e-3 of the largest entry, 100
        ("max", [0.09, 0.0], True),
        ("max", [0.11, 0.0], False),
        ("elementwise", [0.0009, 0.09], True),
        ("elementwise", [0.0011, 0.0], False),
        (0.5, [0.4, 0.4], True),
        (0.5, [0.4, 0.6], False),
    ],
)
def test_comparisons(registry, tmp_path, compare, error, passes):
    expected = torch.tensor([1.0, 100.0], dtype=torch.float64)
    args = {} if compare is None else {"compare": {"y": compare}}
    case = make_case(tmp_path / "c", {"out/y": expected}, step={"args": args})
    answer = expected + torch.tensor(error, dtype=torch.float64)
    if passes:
        run(case, answer)
    else:
        with pytest.raises(GoldenFailure):
            run(case, answer)


def test_slices(registry, tmp_path):
    whole = torch.arange(60.0).view(3, 4, 5)
    args = {"slice": {"y": [1, [0, None, 2], None]}}
    case = make_case(tmp_path / "c", {"out/y": whole[1, ::2]}, step={"args": args})
    run(case, whole)
    assert case.steps[0].args == {}  # reserved, so no setting of the operation
    for entries, expected in (
        ([[-2, None]], whole[-2:]),
        ([None, -1], whole[:, -1]),
        ([[0, 2], [0, 3]], whole[:2, :3]),
    ):
        assert np.array_equal(take_slice(whole.numpy(), entries), expected.numpy())
    registry._runners.clear()
    with pytest.raises(GoldenFailure, match="cannot be sliced"):
        run(case, whole[0, 0, 0])


def test_unknown_steps_fail(registry, tmp_path):
    registry.runner(MODEL, "double")(lambda case, step: {})
    tensors = {"in/x": X, "out/y": X}
    other_op = make_case(tmp_path / "a", tensors, step={"op": "triple"})
    other_model = make_case(tmp_path / "b", tensors, model="harness/other")
    no_answer = make_case(tmp_path / "c", tensors)
    quirk_of_other = make_case(tmp_path / "d", tensors, model="harness/other", step={"quirk": True})
    for case, message in (
        (other_op, "no runner for op 'triple'"),
        (other_model, "no runner for model 'harness/other'"),
        (no_answer, "gave no y"),
        (quirk_of_other, "no runner for model"),
    ):
        with pytest.raises(GoldenFailure, match=message):
            run_step(case, case.steps[0])


def test_inputs_by_name_position_and_stored_answer(registry, tmp_path):
    step = {"inputs": ["first", "y"], "args": {"extra_inputs": ["x"]}}
    case = make_case(tmp_path / "c", {"in/x": X, "in/first": X + 1, "out/y": X + 2}, step=step)
    (step,) = case.steps
    assert torch.equal(step.tensor("x", 0), X)
    assert torch.equal(step.tensor("image", 0), X + 1)
    assert torch.equal(step.tensor("image", 1), X + 2)
    with pytest.raises(GoldenFailure, match="no input 'image'"):
        step.tensor("image", 3)


def test_quirks_are_named_and_checked(registry, tmp_path):
    case = make_case(tmp_path / "c", {"in/x": X, "out/y": X}, step={"quirk": True})
    (step,) = case.steps
    assert step.id == "c/0-double-quirk"
    registry.runner(MODEL, "other")(lambda case, step: {})
    with pytest.warns(UserWarning, match="not reproduced"):
        run_step(case, step)

    @registry.quirk_check(MODEL, "double")
    def check(case, step):
        assert not torch.equal(step.expected("y"), X), "the fault is reproduced"

    with pytest.raises(AssertionError, match="the fault is reproduced"):
        run_step(case, step)


def test_one_runner_per_operation(registry):
    registry.runner(MODEL, "double")(lambda case, step: {})
    with pytest.raises(ValueError, match="two functions"):
        registry.runner(MODEL, "double")(lambda case, step: {})


def test_state_follows_the_fill_rule(tmp_path):
    shapes = {"a.weight": [64, 100], "pos": [1, 8, 16], "norm.weight": [50], "bias": [50], "kept": [2, 2]}
    parts = {"state": shapes, "stored": ["kept"]}
    case = make_case(tmp_path / "c", {"state/kept": X}, **parts)
    state = case.state
    assert {key: list(value.shape) for key, value in state.items()} == shapes
    assert torch.equal(state["kept"], X)
    # The first of PCG64's normal numbers for this name: the format is fixed for good.
    normal = np.random.default_rng(zlib.crc32(b"a.weight")).standard_normal((64, 100), dtype=np.float32)
    assert np.allclose(state["a.weight"], normal / 10)
    assert 0.3 < state["pos"].std() < 0.7
    assert abs(state["norm.weight"].mean() - 1) < 0.1 < abs(state["norm.weight"].mean() - state["bias"].mean())
    assert torch.equal(state["bias"], torch.from_numpy(fill("bias", [50])))

    scaled = make_case(tmp_path / "d", {"state/kept": X}, build={"unit_variance_weights": True}, **parts).state
    assert torch.allclose(scaled["a.weight"], state["a.weight"] * 10)
    assert torch.equal(scaled["kept"], X)
    assert torch.equal(scaled["bias"], state["bias"])
    with pytest.raises(GoldenFailure, match="state rule"):
        _ = make_case(tmp_path / "e", {"state/kept": X}, state_rule="times two", **parts).state


def test_damaged_and_absent_cases_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no golden case"):
        find_cases(tmp_path)
    (tmp_path / "case.json").write_text("{}")
    assert find_cases(tmp_path) == [tmp_path]
    with pytest.raises(ValueError, match="is no golden case"):
        Case(tmp_path)


def test_environment_adds_cases_and_foreign_ones_fail(tmp_path):
    make_case(tmp_path / "vit_vqgan_loss", {"in/x": X, "out/y": X}, model="nobody/knows")
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent / "test_golden.py"), "-k", "vit_vqgan_loss"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | {"VISTOK_GOLDEN": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "1 failed, 3 passed" in result.stdout, result.stdout + result.stderr
    assert "extra:vit_vqgan_loss/0-double: no runner for model 'nobody/knows'" in result.stdout
