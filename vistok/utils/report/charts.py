"""Small charts of a report, as SVG that takes its colours from the page: dark pages have dark charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from vistok.utils.report.blocks import Block

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
LOG_FROM = 100
"""The ratio of the largest to the smallest value from which on a chart of positive values is logarithmic."""
MOST_POINTS = 400

Points = Sequence[tuple[float, float]]
Style: TypeAlias = Literal["own", "second", "reference"]


@dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        points: (x, y) in order of x; a y of None or NaN is a gap.
        label: in the legend; empty where there is one line only.
        style: "own", "second", or "reference", which is dashed.
        names: of dots, a text beside each point, or empty.
    """

    points: Sequence[tuple[float, float | None]]
    label: str = ""
    style: Style = "own"
    names: Sequence[str] = ()

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float | None]], name: str, label: str = "", style: Style = "own") -> Line:
        """The curve of metric ``name`` over "step" in the rows of a metrics.jsonl."""
        return cls([(row["step"] or 0, row[name]) for row in rows if name in row], label, style)

    @property
    def runs(self) -> list[Points]:
        """The points between gaps, thinned evenly where there are more than a chart can show."""
        stride = -(-len(self.points) // MOST_POINTS)
        kept = self.points[len(self.points) - 1 :: -stride][::-1] if self.points else []
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in kept:
            if y is None or not math.isfinite(y):
                runs.append([])
            else:
                runs[-1].append((x, y))
        return [run for run in runs if run]


@dataclass(frozen=True)
class Chart:
    """One small chart.

    Attributes:
        title: what is drawn, with the unit.
        x_label: below the chart.
        dots: whether points are marked.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    dots: bool = False
    x_axis: Axis = field(init=False)
    y_axis: Axis = field(init=False)

    def __post_init__(self) -> None:
        drawn = [point for line in self.lines for run in line.runs for point in run]
        if not drawn:
            raise ValueError(f"the chart {self.title!r} has no points")
        xs, ys = zip(*drawn)
        log = min(ys) > 0 and max(ys) >= LOG_FROM * min(ys)
        object.__setattr__(self, "x_axis", Axis.over(xs, LEFT, WIDTH - RIGHT))
        object.__setattr__(self, "y_axis", Axis.over(ys, HEIGHT - BOTTOM, TOP, log=log, margin=0.04))

    width, height, left, bottom, right = WIDTH, HEIGHT, LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT

    @property
    def latest(self) -> str:
        """The last value of the first line."""
        runs = self.lines[0].runs
        return f"{runs[-1][-1][1]:.4g}" if runs else ""

    def paths(self, line: Line) -> list[str]:
        """The line's SVG paths, one for each stretch without a gap."""
        return ["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self._placed(run)) for run in line.runs if len(run) > 1]

    def marks(self, line: Line) -> Iterator[tuple[float, float, str]]:
        """Centres of dots with their names: all of a chart with dots, else points that no line touches."""
        named = iter(line.names)
        for run in line.runs:
            if self.dots or len(run) == 1:
                for x, y in self._placed(run):
                    yield round(x, 1), round(y, 1), next(named, "")

    def _placed(self, run: Points) -> list[tuple[float, float]]:
        return [(self.x_axis.at(x), self.y_axis.at(y)) for x, y in run]


@dataclass(frozen=True)
class Axis:
    """Values to places: ``low`` lies at ``start``, ``high`` at ``end``, in SVG's units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.0) -> Axis:
        """The axis on which all values lie, with ``margin`` of its length free at both ends."""
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        if low == high:
            spread = abs(low) or 1.0
            low, high = low - spread / 2, high + spread / 2
        free = (high - low) * margin
        return cls(low - free, high + free, start, end, log)

    def at(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of round values."""
        if self.log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            stride = -(-len(powers) // 5)
            values = [10.0**power for power in powers[::stride]]
        else:
            step = round_step((self.high - self.low) / 4)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            values = [round(index * step, 12) for index in range(first, last + 1)]
        return [(round(self.at(value), 1), tick_text(value)) for value in values]


def round_step(step: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def tick_text(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,g}k"
    return f"{value:,g}"


@dataclass(frozen=True)
class Charts(Block):
    """Charts side by side where there is room, else below each other.

    Attributes:
        legend: the (style, text) of lines that several charts have.
    """

    charts: Sequence[Chart]
    caption: str = ""
    legend: Sequence[tuple[str, str]] = ()
