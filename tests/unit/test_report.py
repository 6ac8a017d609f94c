"""Reports: blocks as HTML, and charts as SVG."""

from __future__ import annotations

import re

import pytest
from PIL import Image
from support.markup import ReportReader

from vistok.utils.report import (
    Chart,
    Charts,
    Commands,
    Facts,
    Folded,
    Line,
    Notes,
    Paragraph,
    Picture,
    Score,
    ScoreTable,
    Section,
    Slider,
    Table,
    write_report,
)
from vistok.utils.report.charts import Axis


def written(path, *blocks):
    write_report(path, title="<T>", kicker="k", lead="l", sections=[Section("s", blocks)])
    return ReportReader(path)


def test_everything_is_escaped_and_what_was_missed_is_marked(tmp_path):
    table = ScoreTable([Score("good", "1", "a & b", "at least 1", True), Score("bad", "0", "", "at least 1", False)])
    commands = Commands(["# why <not>", "run 'a'"])
    hostile = "<script>alert(1)</script>"
    others = [Facts({hostile: hostile}), Notes([hostile]), Table([{hostile: hostile}]), Folded(hostile, commands)]
    report = written(tmp_path / "report.html", Paragraph("x < y {{ body }}"), table, commands, *others)
    assert "x < y {{ body }}" in report.text
    assert "# why <not>\nrun 'a'" in report.text
    assert ("td", {"class": "target missed"}) in report.tags
    assert "at least 1 ✗ missed" in report.text
    assert report.text.count("at least 1 ✓") == 1
    assert report.text.count(hostile) == 6
    assert "script" not in {tag for tag, _ in report.tags}


def test_pictures_keep_their_pixels():
    html = Picture(Image.new("L", (5, 3)), "c", 'say "hi"', scale=2).html()
    assert 'class="pixels"' in html
    assert 'width="10"' in html
    assert "&#34;hi&#34;" in html
    large = Picture(Image.effect_noise((1200, 1200), 50), "c", "d").source
    assert large.startswith("data:image/webp;base64,")  # as PNG it has 1.4 MB


def test_a_slider_brings_its_script_and_shows_the_last_picture(tmp_path):
    pictures = [Picture(Image.new("L", (4, 4), step), f"step {step}", "d") for step in (1, 2, 3)]
    report = written(tmp_path / "report.html", Slider(pictures, "by step"))
    slides = [attributes for tag, attributes in report.tags if tag == "div" and "data-label" in attributes]
    assert ["hidden" in slide for slide in slides] == [True, True, False]
    assert [slide["data-label"] for slide in slides] == ["step 1", "step 2", "step 3"]
    assert "script" in {tag for tag, _ in report.tags}
    assert all("src" not in attributes for tag, attributes in report.tags if tag == "script")


def test_the_best_cell_stands_out_and_columns_of_numbers_are_aligned():
    html = Table([{"a": "x", "b": 1.5}, {"a": "y", "b": None}], frozenset({(0, "b")})).html()
    assert '<td data-label="b" class="number best">1.500</td>' in html
    assert '<td data-label="b" class="number">–</td>' in html


def test_curves_skip_gaps_and_stay_within_their_frame():
    rows = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": 1.0}, {"step": 5, "a": 3.0}]
    line = Line.of(rows, "a")
    assert line.runs == [[(1, 2.0)], [(4, 1.0), (5, 3.0)]]
    chart = Chart("A", [line])
    assert chart.latest == "3"
    (path,) = chart.paths(line)
    assert len(list(chart.marks(line))) == 1  # the point that no line touches
    places = [float(number) for number in re.findall(r"[\d.]+", path)]
    assert all(chart.left <= x <= chart.right for x in places[::2])
    assert all(0 <= y <= chart.bottom for y in places[1::2])
    assert "var(" not in Charts([chart]).html()  # colours are the style sheet's, in light and in dark


def test_thinned_curves_keep_their_end():
    line = Line([(step, step) for step in range(10_001)])
    assert len(line.runs[0]) <= 400
    assert line.runs[0][-1] == (10_000, 10_000)


def test_a_chart_without_points_is_refused():
    with pytest.raises(ValueError, match="the chart 'x' has no points"):
        Chart("x", [Line([(1, None)])])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], ["0", "0.25", "0.5", "0.75", "1"]),
        ([0, 4000], ["0", "1,000", "2,000", "3,000", "4,000"]),
        ([0, 40_000], ["0", "10k", "20k", "30k", "40k"]),
        ([3, 3], ["2", "3", "4"]),
        ([-2.5e-3, 1e-3], ["-0.002", "-0.001", "0", "0.001"]),
    ],
)
def test_ticks_are_round(values, expected):
    assert [text for _, text in Axis.over(values, 0, 100).ticks] == expected


def test_values_over_several_powers_get_a_logarithmic_axis():
    chart = Chart("loss", [Line([(0, 700.0), (1, 0.5)])])
    assert chart.y_axis.log
    assert [text for _, text in chart.y_axis.ticks] == ["1", "10", "100"]
