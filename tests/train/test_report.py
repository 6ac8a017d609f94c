"""The report of a training run, its reference curve, and the other records of a run."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.markup import ReportReader
from support.tiny_runs import generator_config, killed_at, tokenizer_config, write_tokens

import vistok
from vistok.cli import main
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.atlas import codebook_atlas
from vistok.train.curves import curve_file, reference_curve
from vistok.train.loop import Trainer
from vistok.train.report import example_count, write_run_report
from vistok.types import TokenSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return train(
        tokenizer_config(folder, curve="quickstart-vit_vqgan-tokenizer", validation={"data": {"split": "test"}})
    )


def test_a_run_ends_with_its_page(run):
    report = ReportReader(run / "report.html")
    labels = [
        attributes["data-label"] for tag, attributes in report.tags if tag == "div" and "data-label" in attributes
    ]
    assert labels == ["step 3", "step 6"]
    assert "after 6 of 6 steps" in report.text
    assert "reference: quickstart-vit_vqgan-tokenizer" in report.text
    assert "held-out" in report.text
    assert all(title in report.text for title in ("PSNR in dB", "share of codes in use", "images per second"))
    assert "tokens of 256 images" in report.text
    assert len(report.images()) == 3  # two steps and the atlas
    assert ("path", "line reference") in [(tag, attributes.get("class")) for tag, attributes in report.tags]
    addresses = [attributes[key] for _, attributes in report.tags for key in ("src", "href") if key in attributes]
    assert all(address.startswith("data:") for address in addresses)


def test_the_page_is_made_again_from_the_folder_alone(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "copied")
    before = (copied / "report.html").read_text()
    (copied / "report.html").unlink()
    main_ok(["report", str(copied)])
    assert str(copied / "report.html") in capsys.readouterr().out
    again = (copied / "report.html").read_text()
    assert again.replace(str(copied), str(run)).replace("copied", "mine") == before


def test_images_that_are_gone_leave_the_rest(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copied")
    config = (copied / "config.yaml").read_text().replace("source: digits", f"source: folder\n  root: {tmp_path}/gone")
    (copied / "config.yaml").write_text(config)
    report = ReportReader(write_run_report(copied))
    assert "cannot be read now" in report.text
    assert "gone" in report.text
    assert len(report.images()) == 2


def test_the_page_of_a_generator(tmp_path):
    folder = train(generator_config(tmp_path / "run", write_tokens(tmp_path / "tokens"), training={"image_every": 6}))
    report = ReportReader(folder / "report.html")
    assert "A generator, llama of" in report.text
    assert "Codebook" not in report.text
    assert f"vistok sample {folder}" in report.text


def test_an_interrupted_run_has_a_page_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "optimise", killed_at(4))
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer_config(tmp_path / "run"))
    assert not (tmp_path / "run" / "report.html").exists()
    report = ReportReader(write_run_report(tmp_path / "run"))
    assert "after 4 of 6 steps" in report.text
    assert "goes on with --resume" in report.text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no training run with steps"):
        write_run_report(tmp_path)


def test_a_curve_that_is_not_there_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="no reference curve 'cifar10-lama'; did you mean 'cifar10-llama'"):
        train(tokenizer_config(tmp_path / "run", curve="cifar10-lama"))
    assert reference_curve("cifar10-llama")[-1]["loss"] > 0
    assert curve_file(str(curve_file("cifar10-llama"))) == curve_file("cifar10-llama")


def test_the_atlas_counts_codes_and_shows_their_places(run):
    tokenizer = vistok.load(run / "tokenizer")
    pixels = torch.rand(8, 1, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    atlas = codebook_atlas(tokenizer, pixels)
    assert torch.equal(atlas.counts, torch.bincount(tokenizer.encode(pixels).flatten(), minlength=32))
    assert atlas.dead == int((atlas.counts == 0).sum())
    assert 1 <= atlas.perplexity <= 32
    assert atlas.possible == pytest.approx(1 - (31 / 32) ** 32)
    assert atlas.picture.mode == "RGB"


def test_tokens_without_a_place_have_counts_only(run, monkeypatch):
    tokenizer = vistok.load(run / "tokenizer")
    spec = TokenSpec(4, 32, 4)
    monkeypatch.setattr(type(tokenizer), "spec", property(lambda self: spec))
    atlas = codebook_atlas(tokenizer, torch.zeros(2, 1, 16, 16))
    assert atlas.picture is None
    assert int(atlas.counts.sum()) == 8


@pytest.mark.parametrize(("shape", "count"), [((1, 16, 16), 256), ((3, 128, 128), 64), ((3, 16, 256, 256), 32)])
def test_large_images_are_fewer(shape, count):
    assert example_count(shape) == count


def test_tensorboard_gets_the_pictures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (run / "tensorboard").rglob("events.*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("pictures")] == [3, 6]


def test_the_console_says_what_begins_and_how_to_watch(tmp_path, capsys):
    train(tokenizer_config(tmp_path / "run", training={"max_steps": 1}))
    text = capsys.readouterr().out
    assert "vit_vqgan" in text
    assert "trained parameters" in text
    assert f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in text
    line = next(line for line in text.splitlines() if line.startswith("step 1/1"))
    assert "PSNR" in line
    assert "codes" in line


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code in (0, None)
