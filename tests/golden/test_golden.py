"""Every step of every golden case is one test, ``case/index-op``.

The public cases of the systems built lie in ``cases/``. ``VISTOK_GOLDEN=FOLDER pytest tests/golden`` runs all case
folders in FOLDER as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
