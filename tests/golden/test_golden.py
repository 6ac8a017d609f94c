"""Every step of every golden case is one test, ``case/index-op``.

The public cases of the systems built lie in ``cases/``. ``VISTOK_GOLDEN=FOLDER pytest tests/golden`` runs all case
folders in FOLDER as well.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from . import runners  # noqa: F401  registers all runners
from .harness import Case, GoldenFailure, find_cases, load_case, run_step

PUBLIC = Path(__file__).parent / "cases"


def _steps() -> list:
    folders = {path.name: path for path in find_cases(PUBLIC)}
    if extra := os.environ.get("VISTOK_GOLDEN"):
        # A case with the name of a public one may differ from it, so both run.
        folders |= {f"extra:{path.name}": path for path in find_cases(Path(extra))}
    return [
        pytest.param(folder, label, step.index, id=step.id)
        for label, folder in folders.items()
        for step in Case(folder, label).steps
    ]


@pytest.mark.parametrize(("folder", "label", "index"), _steps())
def test_golden(folder: Path, label: str, index: int):
    case = load_case(folder, label)
    problem = None
    try:
        run_step(case, case.steps[index])
    except GoldenFailure as failure:
        problem = str(failure)
    if problem:  # the message is enough; a traceback through the harness would hide it
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("name", ["randar_gpt", "lpd_generator"])
def test_inputs_of_generators_with_queries_may_have_other_names_and_integers(name: str):
    case = Case(PUBLIC / name)
    step = next(step for step in case.steps if step.op == "loss" and step.has("drop_u"))
    names = tuple(f"{name}_2" for name in step.inputs)
    given = {f"in/{new}": case.tensors[f"in/{old}"] for new, old in zip(names, step.inputs)}
    case.tensors |= {key: t.int() if t.dtype == torch.int64 else t for key, t in given.items()}
    run_step(case, replace(step, inputs=names))
