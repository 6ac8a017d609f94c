"""`vistok eval` and `vistok benchmark` as they are typed, with a stand-in for Inception."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.eval_data import FakeInception, smooth_images, write_folder
from support.tiny_models import tiny

from vistok.cli import main
from vistok.eval.networks import InceptionV3Compat
from vistok.pipelines import Pipeline

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def inception(monkeypatch):
    monkeypatch.setattr(InceptionV3Compat, "load", lambda weights=None, *, resize, device: FakeInception(resize))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line; returns exit code and everything printed."""

    def command(*arguments) -> tuple[int, str]:
        texts = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["vistok", *texts])
        with pytest.raises(SystemExit) as end:
            main(texts)
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out + printed.err

    return command


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "val", smooth_images(8, seed=3, size=40))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipe") / "run"
    Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt")).save_pretrained(folder)
    return folder


def test_a_reference_is_made_and_serves_a_benchmark(run, photos, pipe, tmp_path):
    code, text = run("eval", photos, "--make-reference", tmp_path / "ref.npz", "--split", "train", "--crop", 16)
    assert code == 0, text
    assert "stands for 8 images" in text
    assert np.load(tmp_path / "ref.npz")["split"] == "train"

    command = ("benchmark", pipe, "--num", 12, "--reference", tmp_path / "ref.npz", "--labels", "random",
               "--guidance-sweep", "1.0,2.0", "--out", tmp_path / "out", "top_k=8")  # fmt: skip
    code, text = run(*command)
    assert code == 0, text
    (header, *rows) = [line.split() for line in text.splitlines() if re.match(r" *(guidance|[12]) ", line)]
    assert header[:2] == ["guidance", "fid"]
    assert [row[0] for row in rows] == ["1", "2"]
    assert text.count("lowest fid") == 1
    assert "report.html" in text
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["runs"][0]["scores"]) >= {"fid", "sfid", "is", "is_shuffled", "precision", "recall"}
    assert result["benchmark"]["sampling"]["top_k"] == 8
    assert result["command"].startswith("vistok benchmark")
    assert (tmp_path / "out" / "report.html").read_text().count(result["command"]) == 1
    code, text = run(*command)
    assert code == 0, text
    assert json.loads((tmp_path / "out" / "result.json").read_text())["generated"] == 0


def test_a_sweep_that_is_no_list_of_numbers_is_refused(run, pipe, tmp_path):
    code, text = run("benchmark", pipe, "--guidance-sweep", "1.0;2.0", "--out", tmp_path / "out")
    assert code == 2
    assert "expected numbers separated by commas, such as 1.0,1.5,2.0; got '1.0;2.0'" in text


def test_a_tokenizer_has_rfid_and_pfid_and_refuses_training_statistics(run, photos, tmp_path):
    tiny("vit_vqgan").save_pretrained(tmp_path / "tokenizer")
    data = (f"data.root={photos}", "data.split=null")
    code, text = run(
        "eval", tmp_path / "tokenizer", *data, "--protocol", "reconstruction", "--out", tmp_path / "r.json"
    )
    assert code == 0, text
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    assert {"rfid", "psnr", "ssim"} <= set(scores)
    code, text = run("eval", tmp_path / "tokenizer", *data, "--protocol", "perturbation", "--out", tmp_path / "p.json")
    assert code == 0, text
    perturbed = json.loads((tmp_path / "p.json").read_text())["scores"]
    assert perturbed["rfid"] == pytest.approx(scores["rfid"], rel=1e-6)
    assert "no official code" in text

    np.savez(tmp_path / "adm.npz", mu=np.zeros(6), sigma=np.eye(6))
    code, text = run("eval", tmp_path / "tokenizer", "--reference", tmp_path / "adm.npz")
    assert code == 2
    assert "4.28 against the training statistics instead of 2.19" in text
    code, text = run("eval", tmp_path / "tokenizer", *data, "--protocol", "adm")
    assert code == 2
    assert "by the protocol reconstruction or perturbation, not by 'adm'" in text
    for option in (("--crop", 16), ("--metrics", "fid"), ("--make-reference", tmp_path / "ref.npz")):
        code, text = run("eval", tmp_path / "tokenizer", *data, *option)
        assert code == 2
        assert f"Invalid value for {option[0]}" in text
        assert "scored without it" in text


def test_small_scores_are_printed_with_their_digits_and_every_note_once(run, photos, pipe, tmp_path):
    code, text = run("eval", photos, "--reference", photos, "--split", "val")
    assert code == 2
    assert "goes with --make-reference" in text
    code, text = run("benchmark", pipe, "--num", 6, "--reference", photos, "--protocol", "torch-fidelity",
                     "--guidance-sweep", "1.0,1.5", "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, text
    assert text.count("images: only 6 images") == 1
    assert "no is: it needs at least 10 images, and the benchmark has 6" in text
    scores = json.loads((tmp_path / "out" / "result.json").read_text())["runs"][0]["scores"]
    assert abs(scores["kid_std"]) < 0.1
    assert f"{scores['kid_std']:#.4g}" in text
