"""Records that another program, another version or a person wrote: metrics, results, features of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_models import tiny
from support.tiny_runs import tokenizer_config

from vistok.data import DataConfig
from vistok.eval.features import Extraction
from vistok.eval.plan import BenchmarkError
from vistok.eval.store import FeatureStore
from vistok.pipelines.card import _scores
from vistok.probing import ProbeSettings
from vistok.probing.run import _judge
from vistok.train.monitor import read_metrics
from vistok.train.report import REPORT_FILE, write_run_report
from vistok.utils.tensors import load_file, save_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tokenizer_config(tmp_path)))
    return tmp_path


def write_rows(run: Path, *lines: str) -> None:
    rows = [json.dumps({"step": step, "loss": 1 / step, "seconds": float(step)}) for step in range(1, 4)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*rows, *lines]))


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 4, "loss": NaN, "seconds": 4}',
        '{"step": 4, "loss": -Infinity, "seconds": 4}',
        '{"step": 4, "loss": 1e400, "seconds": 1e400}',
        '{"step": 4, "loss": 1' + "0" * 400 + "}",
        '{"step": 4, "loss": 1e308, "lr": -1e308}',
        '{"step": 4, "seconds": null, "images_per_second": 0}',
        '{"step": 4, "images_per_second": NaN}',
        '{"step": 4.0, "loss": true}',
        '{"step": 4, "": 1, "<script>": 2, "\\u0000": 3, "\\ud800": 4}',
        '{"step": 1}',
        '{"step": 3',  # cut: no row
    ],
)
def test_odd_rows_of_metrics_make_a_page(run: Path, line: str):
    write_rows(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line if line.endswith("3") else f"{line}\n")
    write_run_report(run)
    page = (run / REPORT_FILE).read_text(encoding="utf-8")
    assert "<script>2" not in page
    assert all(
        value is None or abs(value) < 1e309 for row in read_metrics(run / "metrics.jsonl") for value in row.values()
    )


@pytest.mark.parametrize(
    "line",
    [f'{{"step": {step}}}' for step in ("NaN", "1e400", "-5", "3.5", "true", "null", '"3"', "1" + "0" * 400)]
    + ['{"loss": 1}', "[]", "3", "null", '{"step": 4, "loss": "1"}', '{"step": 4, "loss": [1]}', '{"step": 4'],
)
def test_lines_that_are_no_metrics_are_named(run: Path, line: str):
    write_rows(run, line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4 is no row of metrics \(.*\); remove the line"):
        write_run_report(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": "vit_vqgan"},
        {"model": {"name": 3}},
        {"training": []},
        {"training": {"max_steps": "many"}},
        {"training": {}},
        {"curve": 3},
    ],
)
def test_a_config_of_something_else_is_no_run(run: Path, changes: dict):
    write_rows(run)
    (run / "config.yaml").write_text(yaml.safe_dump(tokenizer_config(run) | changes))
    with pytest.raises(ValueError, match=r"config\.yaml is no config of a training run"):
        write_run_report(run)


@pytest.mark.parametrize(
    "result",
    [
        [],
        {},
        {"runs": {}},
        {"runs": 3},
        {"runs": [3]},
        {"runs": []},
        {"scores": [1]},
        {"scores": {"fid": "3"}},
        {"scores": {"fid": float("nan")}},
        {"scores": {"fid": True}},
        {"scores": {"fid": 3.0}, "images": []},
        {"scores": {"fid": 3.0}, "images": {"count": "many"}},
        {"scores": {"fid": 3.0}, "reference": "photos"},
        {"runs": [{"scores": {"fid": 3.0}}, {"scores": {"fid": [3]}}]},
    ],
)
def test_scores_of_something_else_are_refused(tmp_path: Path, result: object):
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"result\.json holds no scores of vistok benchmark"):
        _scores(tmp_path)


def test_the_best_of_several_scores_has_one(tmp_path: Path):
    runs = [{"scores": {"is": 3.0}}, {"scores": {"fid": 5.0, "is": None}}, {"scores": {"fid": None}}]
    (tmp_path / "result.json").write_text(json.dumps({"runs": runs}))
    assert _scores(tmp_path)[0] == {"fid": 5.0}


@pytest.mark.parametrize("change", ["no digests", "fewer rows", "no features", "no preview", "a number"])
def test_features_of_something_else_are_not_scored(tmp_path: Path, change: str):
    store = FeatureStore(tmp_path, [(0, 3)], (4, 4), keep_images=False)
    rows = torch.zeros(3, 2)
    whole = Extraction((4, 4), torch.zeros(3, 32), {"pool": rows}, {})
    store.write((0, 3), torch.zeros(3, 3, 4, 4, dtype=torch.uint8), whole)
    assert len(store.read(keep=["pool"], moments=["pool"]).features["pool"]) == 3
    path = next(tmp_path.rglob("*.safetensors"))
    tensors = load_file(path)
    if change.startswith("no "):
        del tensors[{"digests": "digests", "features": "feature.pool", "preview": "preview"}[change[3:]]]
    else:
        tensors["feature.pool"] = rows[:2] if change == "fewer rows" else torch.zeros(())
    save_file(tensors, path)
    with pytest.raises(BenchmarkError, match=r"safetensors is damaged: it lacks .* of 3 images; remove it"):
        store.read(keep=["pool"], moments=["pool"])


@pytest.mark.parametrize("content", [[], {}, {"tokenizer": 3}, {"tokenizer": {}, "data": {}, "speed": None}])
def test_measurements_of_something_else_are_not_shown(tmp_path: Path, content: object):
    (tmp_path / "measured.json").write_text(json.dumps(content))
    data = DataConfig(16, source="digits")
    with pytest.raises(ValueError, match=r"measured\.json (lacks .*; remove it to measure again|does not hold)"):
        _judge(tiny("vit_vqgan"), data, data, tmp_path, ProbeSettings(), None)
