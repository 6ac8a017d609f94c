"""Common parts of the quickstarts' reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vistok.quickstart.systems import System
from vistok.utils.report import Chart, Charts, Line, Score

NOTE = (
    "The classifier is tiny and so is the data set: these scores tell a good run from a bad one, and no more. "
    "result.json holds them with everything they depend on."
)


def charts_of(named: Iterable[tuple[str, Sequence[Mapping[str, Any]], str]], caption: str) -> Charts:
    """Charts of metrics, without those that were not measured.

    Args:
        named: title, rows of a metrics.jsonl, and name of the metric, for each chart.
    """
    charts = [Chart(title, [Line.of(rows, name)]) for title, rows, name in named if any(name in row for row in rows)]
    return Charts(charts, caption)


def recognised_score(share: float, system: System, meaning: str) -> Score:
    """The share that is recognised as what was asked for, with the system's target."""
    return Score(
        "recognised",
        f"{share:.1%}",
        meaning,
        f"at least {system.recognised:.0%}".replace("%", " %"),
        share >= system.recognised,
    )


def distinct_score(share: float) -> Score:
    """The share of different token sequences, with its target."""
    return Score(
        "distinct",
        f"{share:.1%}",
        "Different token sequences among the generated ones; low where the generator repeats itself.",
        "at least 90 %",
        share >= 0.9,
    )


def seconds_score(seconds: float, system: System) -> Score:
    """The duration of the whole quickstart, with the system's target."""
    return Score(
        "seconds",
        f"{seconds:.0f}",
        "For all of it on this machine.",
        f"at most {60 * system.minutes:.0f}",
        seconds <= 60 * system.minutes,
    )


def environment_facts(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Sampling options, seed, versions, device and revision, for the report."""
    environment = protocol["environment"]
    return {
        "Sampling": ", ".join(f"{name} {value}" for name, value in protocol["sampling"].items()) or "defaults",
        "Seed": str(protocol["recipe"]["seed"]),
        "Versions": ", ".join(
            f"{name} {environment[name]}" for name in ("vistok", "python", "torch", "numpy") if name in environment
        ),
        "Device": str(environment["device"]),
        "Revision": environment["git_revision"] or "not from a git checkout",
    }
