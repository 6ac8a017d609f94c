"""Reading golden cases, finding the runner of a step, and comparing its answers.

A golden case is a folder with ``case.json`` (the reference's arguments, shapes of its weights, and a list of steps)
and ``tensors.safetensors`` (inputs, answers, and what no rule gives). A step names an operation (``op``) of a model;
a runner, registered for (model, op), computes the step with vistok and returns {output name: answer}:

    @runner("eval/lpips", "lpips")
    def lpips(case, step):
        return step.answers(model(step.tensor("decoded", 1), step.tensor("target", 0)))

Runners are driven by ``case.config``, ``case.build`` and ``step.args``, never by a case's name.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

RESERVED_ARGS = ("slice", "compare", "extra_inputs")


class GoldenFailure(AssertionError):
    """A step whose answer differs, is missing, or that no runner understands."""


# ---------------------------------------------------------------------------------------------------------------------
# Cases and steps


@dataclass(frozen=True)
class Step:
    """One operation of a case. ``args`` are its own settings; the reserved ones are attributes."""

    case: Case = field(repr=False)
    index: int
    op: str
    args: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tol: float
    note: str
    quirk: bool
    slices: Mapping[str, list]
    compare: Mapping[str, Any]

    @property
    def id(self) -> str:
        return f"{self.case.label}/{self.index}-{self.op}" + ("-quirk" if self.quirk else "")

    def has(self, name: str) -> bool:
        """Whether the step lists an input (or extra input) of this name."""
        return name in self.inputs

    def tensor(self, name: str, position: int) -> Tensor:
        """The input called ``name``, else the one at ``position``: cases may name the same input differently."""
        if not self.has(name) and position >= len(self.inputs):
            raise GoldenFailure(f"{self.id}: no input {name!r} nor one at position {position} in {self.inputs}")
        return self.case.tensor(name if self.has(name) else self.inputs[position])

    def answers(self, *values: Any) -> dict[str, Any]:
        """Pair the outputs, in the order of the operation's table, with as many values."""
        if len(self.outputs) > len(values):
            raise GoldenFailure(f"{self.id}: {self.op} has {len(values)} answers, the step wants {self.outputs}")
        return dict(zip(self.outputs, values))

    def expected(self, name: str) -> Tensor:
        """The stored answer ``name`` (already sliced where ``slices`` says so)."""
        key = f"out/{name}"
        if key not in self.case.tensors:
            raise GoldenFailure(f"{self.id}: the case stores no answer {name!r}")
        return self.case.tensors[key]


class Case:
    """A golden case: the reference's arguments and weights, inputs, steps, and stored answers.

    Weights and models are made when first asked for, and kept as long as the case is.
    """

    def __init__(self, folder: str | Path, label: str | None = None):
        self.folder = Path(folder)
        self.label = label or self.folder.name
        try:
            description = json.loads((self.folder / "case.json").read_text())
            self.model: str = description["model"]
            self.config: dict[str, Any] = description["config"]
            self.build: dict[str, Any] = description.get("build", {})
            self.shapes: dict[str, list[int]] = description["state"]
            self.stored = frozenset(description.get("stored", ()))
            self.state_rule: str | None = description.get("state_rule")
            self.steps = tuple(self._step(index, step) for index, step in enumerate(description["steps"]))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder} is no golden case: {error!r}") from error
        self._built: dict[str, Any] = {}

    def _step(self, index: int, step: dict[str, Any]) -> Step:
        args = step.get("args", {})
        return Step(
            case=self,
            index=index,
            op=step["op"],
            args={key: value for key, value in args.items() if key not in RESERVED_ARGS},
            inputs=(*step.get("inputs", ()), *args.get("extra_inputs", ())),
            outputs=tuple(step["outputs"]),
            tol=float(step["tol"]),
            note=step.get("note", ""),
            quirk=bool(step.get("quirk", False)),
            slices=args.get("slice", {}),
            compare=args.get("compare", {}),
        )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in tensors.safetensors: ``in/<name>``, ``out/<name>``, ``state/<key>``."""
        return load_file(self.folder / "tensors.safetensors")

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The reference's state dict: stored values, and the fill rule for all others."""
        unit_variance = self.build.get("unit_variance_weights", False)
        if self.state_rule and not unit_variance:
            raise GoldenFailure(f"{self.label}: no build option stands for the state rule {self.state_rule!r}")
        state = {}
        for key, shape in self.shapes.items():
            if key in self.stored:
                state[key] = self.tensors[f"state/{key}"]
                continue
            state[key] = torch.from_numpy(fill(key, shape))
            if unit_variance and len(shape) >= 2:
                state[key] *= math.sqrt(math.prod(shape[1:]))
        return state

    def tensor(self, name: str) -> Tensor:
        """The input ``name``, or the stored answer ``name`` of an earlier step."""
        for key in (f"in/{name}", f"out/{name}"):
            if key in self.tensors:
                return self.tensors[key].clone()
        raise GoldenFailure(f"{self.label}: no input and no stored answer is called {name!r}")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of the first ``make()`` under ``name``; later calls reuse it."""
        if name not in self._built:
            self._built[name] = make()
        return self._built[name]

    def build_model(self) -> torch.nn.Module:
        """The vistok model of the case's config and weights, in eval mode; built once."""
        import vistok

        return self.once("model", lambda: vistok.from_official(self.model, self.config, self.state)).eval()


@lru_cache(maxsize=2)  # the steps of a case run one after another, so at most two cases are in memory
def load_case(folder: Path, label: str | None = None) -> Case:
    return Case(folder, label)


def find_cases(folder: Path) -> list[Path]:
    """The case folders in ``folder``, or ``folder`` itself if it is one.

    Raises:
        ValueError: there is none.
    """
    if (folder / "case.json").is_file():
        return [folder]
    cases = sorted(path.parent for path in folder.glob("*/case.json"))
    if not cases:
        raise ValueError(f"no golden case (a folder with a case.json) in {folder}")
    return cases


def fill(key: str, shape: list[int]) -> np.ndarray:
    """The float32 value of a tensor that no file stores, from its name and shape.

    Standard normal numbers from PCG64 seeded with the name's CRC-32, then by shape: three or more dimensions, the
    first of them 1: times 0.5; else two or more: divided by sqrt(fan-in); one dimension: times 0.1, plus 1 for a name
    that ends in weight, gamma or scale.
    """
    normal = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 3 and shape[0] == 1:
        value = normal * 0.5
    elif len(shape) >= 2:
        value = normal / math.sqrt(math.prod(shape[1:]))
    else:
        offset = 1 if len(shape) == 1 and key.endswith(("weight", "gamma", "scale")) else 0
        value = offset + normal * 0.1
    return np.asarray(value, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Runners

Runner = Callable[[Case, Step], Mapping[str, Any]]
QuirkCheck = Callable[[Case, Step], None]

_runners: dict[tuple[str, str], Runner] = {}
_quirk_checks: dict[tuple[str, str], QuirkCheck] = {}


def runner(model: str, op: str) -> Callable[[Runner], Runner]:
    """Register the function (case, step) -> {output name: tensor, array or number} for ``op`` of ``model``."""
    return _register(_runners, model, op)


def quirk_check(model: str, op: str) -> Callable[[QuirkCheck], QuirkCheck]:
    """Register the function (case, step) that asserts how vistok differs from a fault of the reference."""
    return _register(_quirk_checks, model, op)


def _register(table: dict, model: str, op: str):
    def register(function):
        if (model, op) in table:
            raise ValueError(f"two functions are registered for op {op!r} of {model}")
        table[model, op] = function
        return function

    return register


def run_step(case: Case, step: Step) -> None:
    """Compute a step and compare every output with its stored answer; a quirk's check runs instead.

    A quirk without a check passes: the library does not reproduce it, and the test's id and a warning say so.

    Raises:
        GoldenFailure: an answer differs or is missing, or no runner understands the step.
    """
    models = {model for model, _ in (*_runners, *_quirk_checks)}
    if case.model not in models:
        raise GoldenFailure(f"{step.id}: no runner for model {case.model!r}; there are: {', '.join(sorted(models))}")
    if step.quirk:
        check = _quirk_checks.get((case.model, step.op))
        if check:
            check(case, step)
        else:
            warnings.warn(f"{step.id}: fault of the reference, not reproduced. {step.note}", stacklevel=2)
        return
    function = _runners.get((case.model, step.op))
    if function is None:
        ops = sorted(op for model, op in _runners if model == case.model)
        raise GoldenFailure(f"{step.id}: no runner for op {step.op!r} of {case.model}; there are: {', '.join(ops)}")
    got = function(case, step)
    missing = [name for name in step.outputs if name not in got]
    if missing:
        raise GoldenFailure(
            f"{step.id}: the runner gave no {', '.join(missing)}; it gave {', '.join(got) or 'nothing'}"
        )
    problems = [problem for name in step.outputs if (problem := difference(step, name, got[name]))]
    if problems:
        raise GoldenFailure("\n".join(f"{step.id}: {problem}" for problem in problems))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def difference(step: Step, name: str, answer: Any) -> str | None:
    """Say how ``answer`` differs from the stored answer ``name`` beyond the step's tolerance; None if it does not."""
    expected = step.expected(name).detach().cpu().numpy()
    try:
        got = take_slice(_to_numpy(answer), step.slices.get(name))
    except IndexError as error:
        return f"{name} {_to_numpy(answer).shape} cannot be sliced by {step.slices[name]}: {error}"
    if not same_shape(got.shape, expected.shape):
        return f"{name} has shape {got.shape}, expected {expected.shape}"
    got = got.reshape(expected.shape)
    if expected.dtype.kind in "iub":
        return _integer_difference(name, got, expected)
    return _float_difference(name, got, expected, step.tol, step.compare.get(name))


def same_shape(got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether shapes are equal; a scalar and a vector of one element count as equal."""
    return got == expected or {got, expected} == {(), (1,)}


def take_slice(array: np.ndarray, entries: list | None) -> np.ndarray:
    """Take the part that a ``slice`` argument names: per leading axis null (all), an index, or [start, stop, step]."""
    if entries is None:
        return array
    return array[tuple(slice(*e) if isinstance(e, list) else slice(None) if e is None else e for e in entries)]


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _integer_difference(name: str, got: np.ndarray, expected: np.ndarray) -> str | None:
    if got.dtype.kind not in "iub":
        return f"{name} is {got.dtype}, expected integers"
    wrong = np.argwhere(got != expected)
    if not len(wrong):
        return None
    first = tuple(wrong[0].tolist())
    return (
        f"{name}: {len(wrong)} of {expected.size} integers differ, first at {first}: {got[first]} != {expected[first]}"
    )


def _float_difference(
    name: str, got: np.ndarray, expected: np.ndarray, tol: float, compare: str | float | None
) -> str | None:
    if not expected.size:
        return None
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    match compare:
        case None:
            allowed = np.full_like(expected, tol)
        case "max":
            allowed = np.full_like(expected, tol * np.abs(expected).max())
        case "elementwise":
            allowed = tol * np.abs(expected)
        case int() | float():
            allowed = np.full_like(expected, compare)
        case _:
            return f"{name}: unknown comparison {compare!r}"
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.abs(got - expected)
    close = (error <= allowed) | (got == expected) | (np.isnan(got) & np.isnan(expected))
    if close.all():
        return None
    excess = np.where(close, -np.inf, np.nan_to_num(error, nan=np.inf) - allowed)
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    return (
        f"{name}: {int((~close).sum())} of {expected.size} values differ, worst at {tuple(map(int, worst))}: "
        f"{got[worst]:.9g} instead of {expected[worst]:.9g}, error {error[worst]:.3g} > {allowed[worst]:.3g}"
    )
