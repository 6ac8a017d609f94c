"""Reference curves: thinned metrics of runs of the shipped configs, in files beside this one (see docs/curves)."""

from __future__ import annotations

from pathlib import Path

from vistok.signatures import ConfigError
from vistok.train.monitor import read_metrics
from vistok.utils.spelling import suggestion

HERE = Path(__file__).parent


def curve_file(name: str) -> Path:
    """The file of a reference curve.

    Args:
        name: the path of a metrics.jsonl, or the name of a shipped curve.

    Raises:
        ConfigError: there is no such curve.
    """
    file = Path(name) if name.endswith(".jsonl") else HERE / f"{name}.jsonl"
    if not file.is_file():
        known = sorted(path.stem for path in HERE.glob("*.jsonl"))
        raise ConfigError(
            f"curve: there is no reference curve {name!r}{suggestion(name, known) or '.'} Give one of "
            f"{', '.join(known)}, or the path of another run's metrics.jsonl"
        )
    return file


def reference_curve(name: str) -> list[dict[str, float | None]]:
    """The rows of a reference curve; see :func:`curve_file`.

    Raises:
        ConfigError: there is no such curve.
    """
    return read_metrics(curve_file(name))
