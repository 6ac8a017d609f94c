"""The generation benchmark: same numbers in one run, after an interruption and when continued; its report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.eval_data import as_tensor, colour_statistics, smooth_images
from support.processes import end, wait_until
from support.tiny_models import tiny

import vistok
from vistok.data.pictures import to_uint8
from vistok.eval import evaluate
from vistok.eval.batches import NETWORK_BATCH
from vistok.eval.benchmark import benchmark
from vistok.eval.plan import BenchmarkError, BenchmarkPlan
from vistok.eval.search import local_minimum
from vistok.pipelines import Pipeline
from vistok.utils.outputs import ResumeError

torch.set_num_threads(1)
NUM = 40
CALL = {
    "num_images": NUM,
    "protocol": "torch-fidelity",
    "features": colour_statistics,
    "network": "colours",
    "reference": as_tensor(smooth_images(30, seed=0, size=16)),
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return make_pipe()


def make_pipe() -> Pipeline:
    names = ["cat", "<dog>", "tench", "crane", "newt"]
    return Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt"), class_names=names, sampling={"guidance_scale": 1.5})


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "out"
    benchmark(pipe, out, save_npz=True, command="vistok benchmark runs/x --num 40", **CALL)
    return out


def read(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def fingerprints(result: dict) -> list[str]:
    return [run["images"]["fingerprint"] for run in result["runs"]]


def test_scores_are_those_of_the_images_that_were_generated(pipe, finished):
    run = read(finished)["runs"][0]
    images = np.load(finished / "guidance-1.5" / "samples.npz")["arr_0"]
    expected = pipe([i % 5 for i in range(NUM)], seed=0).images
    assert np.array_equal(images, np.stack([np.asarray(image) for image in expected]))
    scored = evaluate(as_tensor(images), CALL["reference"], features=colour_statistics, network="colours")
    assert run["scores"] == pytest.approx(scored["scores"], rel=1e-6)
    assert run["images"]["fingerprint"] == scored["images"]["fingerprint"]
    assert not (finished / "guidance-1.5" / "pixels").exists()  # joined in samples.npz


def test_the_result_records_the_plan(pipe, finished):
    result = read(finished)
    plan = result["benchmark"]
    assert (plan["num_images"], plan["labels"], plan["num_classes"], plan["seed"]) == (NUM, "balanced", 5, 0)
    assert plan["generator"] == pipe.generator.fingerprint()
    assert plan["network"]["name"] == "colours"
    assert "guidance_scale" not in plan["sampling"]
    assert result["generated"] == NUM
    rows = result["runs"][0]["classes"]
    assert [(row["class"], row["images"]) for row in rows] == [(label, 8) for label in range(5)]
    assert rows[1]["name"] == "<dog>"
    precision = sum(row["precision"] * row["images"] for row in rows) / NUM
    assert precision == pytest.approx(result["runs"][0]["scores"]["precision"])


def test_the_report_is_one_file_that_shows_scores_and_the_command(finished):
    page = (finished / "report.html").read_text()
    assert "vistok benchmark runs/x --num 40" in page
    assert "&lt;dog&gt;" in page
    assert "<dog>" not in page
    assert f"{read(finished)['runs'][0]['scores']['frechet_distance']:.4g}" in page
    assert "only 40 images" in page
    assert "generated 40 images in" in page
    assert "5 classes of 8 images; the farthest from the real ones first" in page
    assert page.count("data:image/png;base64,") == 1
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # the page loads nothing from elsewhere


class StopsAfter:
    """A pipeline that is killed after some calls."""

    def __init__(self, pipe: Pipeline, calls: int):
        self.pipe, self.left = pipe, calls
        self.tokenizer, self.generator, self.class_names = pipe.tokenizer, pipe.generator, pipe.class_names
        self.options = pipe.options

    def __call__(self, *args, **kwargs):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.pipe(*args, **kwargs)


@pytest.mark.parametrize(
    ("start", "found", "tried"),
    [
        (1.5, 2.0, [1.5, 1.75, 2.0, 2.25]),  # upwards, until the score rises
        (3.0, 2.0, [3.0, 3.25, 2.75, 2.5, 2.25, 2.0, 1.75]),  # downwards, if the score rises upwards
        (2.0, 2.0, [2.0, 2.25, 1.75]),
    ],
)
def test_a_search_ends_at_a_scale_whose_neighbours_are_worse(start, found, tried):
    asked = []

    def score(scale: float) -> float:
        asked.append(scale)
        return (scale - 2.05) ** 2

    assert local_minimum(score, start) == found
    assert asked == tried


def test_a_search_tries_nothing_below_no_guidance():
    assert local_minimum(lambda scale: scale, 1.5) == 1.0
    assert local_minimum(lambda scale: 1.0, 1.5) == 1.5  # an equal score is not better


def test_a_guidance_search_reuses_the_features_of_scales_that_were_tried(pipe, tmp_path):
    first = benchmark(pipe, tmp_path / "out", search_from=1.5, **CALL)
    tried = [run["guidance_scale"] for run in first["runs"]]
    distances = {run["guidance_scale"]: run["scores"]["frechet_distance"] for run in first["runs"]}
    assert first["generated"] == NUM * len(tried)
    neighbours = [scale for scale in (first["found"] - 0.25, first["found"] + 0.25) if scale >= 1]
    assert all(distances[first["found"]] <= distances[scale] for scale in neighbours)
    again = benchmark(pipe, tmp_path / "out", search_from=1.5, **CALL)
    assert (again["generated"], again["found"]) == (0, first["found"])
    assert sorted(run["guidance_scale"] for run in again["runs"]) == sorted(tried)
    assert f"The search ended at guidance {first['found']:g}" in (tmp_path / "out" / "report.html").read_text()


def test_a_search_is_refused_where_it_makes_no_sense(pipe, tmp_path):
    for options, message in (
        ({"guidance_scales": [1.5]}, "leave out what a sweep compares, or the search"),
        ({"temperatures": [0.9]}, "leave out what a sweep compares, or the search"),
        ({"reference": None}, "needs a reference"),
        ({"search_from": 0.5}, "at least 1, which is no guidance; got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark(pipe, tmp_path / "out", **CALL | {"search_from": 1.5} | options)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_benchmark_goes_on_where_it_stopped(pipe, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        benchmark(StopsAfter(pipe, 5), tmp_path / "out", batch_size=7, **CALL)
    assert not (tmp_path / "out" / "result.json").exists()
    continued = benchmark(pipe, tmp_path / "out", **CALL)
    # Ranges of 16 take three calls of at most 7: one was complete when the sixth call failed.
    assert continued["generated"] == NUM - 16
    assert fingerprints(continued) == fingerprints(read(finished))  # every image exactly once
    assert continued["runs"][0]["scores"] == pytest.approx(read(finished)["runs"][0]["scores"], rel=1e-6)
    assert not list((tmp_path / "out").rglob("*.partial"))


def slow_statistics(images: torch.Tensor) -> torch.Tensor:
    time.sleep(0.5)
    return colour_statistics(images)


def test_a_killed_benchmark_goes_on_without_duplicates(pipe, finished, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, test_benchmark as t; "
        "t.benchmark(t.make_pipe(), sys.argv[1], **t.CALL | {'features': t.slow_statistics})"
    )
    places = (Path(__file__).parent, Path(__file__).parents[1], Path(vistok.__file__).parents[1])
    paths = os.pathsep.join(map(str, places))
    worker = subprocess.Popen([sys.executable, "-c", code, str(out)], env=os.environ | {"PYTHONPATH": paths})
    wait_until(lambda: bool(list(out.rglob("*.safetensors"))), worker)
    end(worker)
    assert not (out / "result.json").exists()
    there = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert there
    continued = benchmark(pipe, out, **CALL)
    assert 0 < continued["generated"] < NUM
    assert all(path.read_bytes() == content for path, content in there.items())  # no range was generated again
    assert fingerprints(continued) == fingerprints(read(finished))
    assert continued["runs"][0]["images"]["distinct"] == NUM


def test_pixels_are_made_again_only_if_they_are_asked_for_later(pipe, finished, tmp_path):
    plain = benchmark(pipe, tmp_path / "out", **CALL)
    assert not list((tmp_path / "out").rglob("samples.npz"))
    with_pixels = benchmark(pipe, tmp_path / "out", save_npz=True, **CALL)
    assert (with_pixels["generated"], fingerprints(with_pixels)) == (NUM, fingerprints(plain))
    again = benchmark(pipe, tmp_path / "out", save_npz=True, **CALL)
    assert again["generated"] == 0
    assert "All features were there from earlier calls" in (tmp_path / "out" / "report.html").read_text()
    ours, theirs = (np.load(folder / "guidance-1.5/samples.npz")["arr_0"] for folder in (tmp_path / "out", finished))
    assert np.array_equal(ours, theirs)


def test_a_sweep_reuses_scales_and_draws_its_curves(pipe, finished, tmp_path):
    swept = benchmark(pipe, tmp_path / "out", guidance_scales=[1.0, 1.5], **CALL)
    assert swept["generated"] == 2 * NUM
    assert fingerprints(swept)[1] == fingerprints(read(finished))[0]
    assert fingerprints(swept)[0] != fingerprints(swept)[1]
    more = benchmark(pipe, tmp_path / "out", guidance_scales=[1.0, 1.5, 4.0], **CALL)
    assert more["generated"] == NUM
    assert [run["guidance_scale"] for run in more["runs"]] == [1.0, 1.5, 4.0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # a grid for each
    assert page.count('aria-label="precision against recall over recall"') == 1
    assert "The lowest frechet_distance is" in page


def test_a_sweep_of_temperatures_joins_those_of_guidance(pipe, finished, tmp_path):
    out = tmp_path / "out"
    first = benchmark(pipe, out, guidance_scales=[1.0, 1.5], **CALL)
    both = benchmark(pipe, out, guidance_scales=[1.5], temperatures=[1.0, 0.5], **CALL)
    assert both["generated"] == NUM  # the features at temperature 1 exist already
    settings = [(run["guidance_scale"], run["temperature"]) for run in both["runs"]]
    assert settings == [(1.0, 1.0), (1.5, 1.0), (1.5, 0.5)]
    assert fingerprints(both)[:2] == fingerprints(first)
    assert fingerprints(both)[2] != fingerprints(both)[1]
    page = (out / "report.html").read_text()
    assert "frechet distance: guidance" in page
    assert page.count('class="number best"') == 2  # in the table of scores and in the table of guidance and temperature
    with pytest.raises(ValueError, match="the sweep names no temperature"):
        benchmark(pipe, out, temperatures=[], **CALL)


def test_a_folder_belongs_to_one_plan(pipe, finished, tmp_path):
    with pytest.raises(ResumeError, match="seed was 0 and is now 1"):
        benchmark(pipe, finished, seed=1, **CALL)
    with pytest.raises(ResumeError, match="another sampling"):
        benchmark(pipe, finished, sampling={"top_k": 3}, **CALL)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ResumeError, match="holds other files; choose a new folder"):
        benchmark(pipe, tmp_path, **CALL)


def test_damaged_files_are_named(pipe, tmp_path):
    benchmark(pipe, tmp_path / "out", **CALL)
    shard = sorted((tmp_path / "out").rglob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(BenchmarkError, match=rf"{shard.name} is damaged .* remove it and run the benchmark again"):
        benchmark(pipe, tmp_path / "out", **CALL)
    shard.unlink()
    assert benchmark(pipe, tmp_path / "out", **CALL)["generated"] == 16
    (tmp_path / "out" / "plan.json").write_text("{")
    with pytest.raises(ResumeError, match=r"plan\.json is damaged"):
        benchmark(pipe, tmp_path / "out", **CALL)


def plan(**changes) -> BenchmarkPlan:
    values = {
        "num_images": 5000, "labels": "random", "num_classes": 10, "seed": 0, "sampling": {}, "tokenizer": "t",
        "generator": "g", "network": {}, "dtype": "float32", "image_size": (16, 16),
    }  # fmt: skip
    return BenchmarkPlan(**values | changes)


def test_labels_depend_on_the_number_of_the_image_alone():
    labels = plan().labels_of(0, 5000)
    assert plan().labels_of(1234, 1300) == labels[1234:1300]
    assert plan(seed=1).labels_of(0, 5000) != labels
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 400  # uniform, 500 +- 21
    assert len(set(counts)) > 1  # and not balanced
    assert plan(labels="balanced").labels_of(8, 12) == [8, 9, 0, 1]
    assert plan(labels="none").labels_of(0, 9) is None


def test_ranges_cover_all_images_once_and_suit_few_of_them():
    for num in (2, 40, 5000, 50_000):
        shards = plan(num_images=num).shards
        assert [index for shard in shards for index in range(*shard)] == list(range(num))
        assert max(stop - start for start, stop in shards) <= 512
        assert all((stop - start) % NETWORK_BATCH == 0 for start, stop in shards[:-1])
    assert len(plan(num_images=100).shards) == 7
    assert len(plan(num_images=1000).shards) == 16


def test_benchmarks_that_make_no_sense_are_refused(pipe, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="unknown labels 'even'; known: balanced, random, none"):
        benchmark(pipe, out, labels="even", **CALL)
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        benchmark(pipe, out, **CALL | {"num_images": 1})
    with pytest.raises(ValueError, match="'reconstruction' compares images with their originals"):
        benchmark(pipe, out, **CALL | {"protocol": "reconstruction"})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        benchmark(pipe, out, batch_size=0, **CALL)
    with pytest.raises(ValueError, match="names no guidance scale"):
        benchmark(pipe, out, guidance_scales=[], **CALL)
    with pytest.raises(ValueError, match="guidance_scale must be finite and not negative"):
        benchmark(pipe, out, guidance_scales=[1.0, -2.0], **CALL)
    with pytest.raises(ValueError, match="nothing can be computed: no fid: it needs a reference"):
        benchmark(pipe, out, **CALL | {"reference": None})
    unconditional = Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt", num_classes=0, condition_dropout=0.0))
    with pytest.raises(ValueError, match="labels 'balanced' need a generator with classes"):
        benchmark(unconditional, out, labels="balanced", **CALL)
    assert not out.exists()  # all of this is checked before any work
    result = benchmark(unconditional, out, **CALL)
    assert result["benchmark"]["labels"] == "none"
    assert "classes" not in result["runs"][0]


def test_images_can_be_scored_at_another_size(pipe, tmp_path):
    result = benchmark(pipe, tmp_path / "out", eval_size=12, save_npz=True, **CALL)
    pixels = pipe([0, 1], seed=0).pixels
    expected = to_uint8(torch.nn.functional.interpolate(pixels, (12, 12), mode="bicubic")).permute(0, 2, 3, 1)
    images = np.load(tmp_path / "out/guidance-1.5/samples.npz")["arr_0"]
    assert np.array_equal(images[:2], expected)
    assert result["runs"][0]["images"]["size"] == [12, 12]
    assert any("images are 12x12, reference images 16x16" in text for text in result["runs"][0]["warnings"])


def test_unevenly_filled_classes_are_pointed_out(pipe, tmp_path):
    result = benchmark(pipe, tmp_path / "out", **CALL | {"num_images": 41})
    assert any("41 images do not divide evenly among 5 classes" in text for text in result["runs"][0]["warnings"])


def test_a_second_sweep_keeps_the_first(pipe, tmp_path):
    first = benchmark(pipe, tmp_path / "out", guidance_scales=[1.0], **CALL)
    second = benchmark(pipe, tmp_path / "out", guidance_scales=[1.5], **CALL)
    assert [run["guidance_scale"] for run in second["runs"]] == [1.0, 1.5]
    assert second["generated"] == NUM
    assert second["runs"][0]["scores"] == first["runs"][0]["scores"]
    assert read(tmp_path / "out") == second
    (tmp_path / "out" / "result.json").write_text("[]")
    with pytest.raises(BenchmarkError, match=r"result\.json is damaged"):
        benchmark(pipe, tmp_path / "out", guidance_scales=[1.5], **CALL)
