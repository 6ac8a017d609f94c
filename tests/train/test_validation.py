"""Held-out samples: measured at every checkpoint, with the saved weights, in the same way each time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import fill_folder
from support.tiny_runs import TINY, generator_config, killed_at, tokenizer_config, write_tokens
from typer.testing import CliRunner

import vistok
from vistok.checkpoints import CheckpointError
from vistok.cli import app
from vistok.config import save_config
from vistok.data import DataConfig, TokenCacheError, TokenWriter
from vistok.data.clip_sources import SelectedClips
from vistok.data.loader import TooManyUnreadableError
from vistok.data.opening import open_source
from vistok.data.overlap import shared_images, shared_tokens
from vistok.data.tokens import TokenCache
from vistok.data.video_files import VideoSource
from vistok.data.workers import LoaderWorkerError
from vistok.pipelines.runs import data_of_run
from vistok.signatures import ConfigError
from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN
from vistok.train import TrainingInterrupted, train
from vistok.train.monitor import read_metrics
from vistok.train.tasks.images import example_batch, held_out_images, psnr
from vistok.train.tasks.tokenizer import TokenizerTask
from vistok.train.tokenize import tokenize
from vistok.types import Condition, TokenSpec

HELD_OUT = {"data": {"split": "test", "limit": 50}}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


@pytest.fixture(scope="module")
def held_out_tokens(tokens, tmp_path_factory):
    """Of other digits, by the same tokenizer, in two views."""
    from vistok.pipelines.folders import load_tokenizer

    data = DataConfig(16, source="digits", channels=1, split="test", limit=50)
    folder = tmp_path_factory.mktemp("held_out") / "cache"
    tokenize(load_tokenizer(tokens), data, folder, augmentation="flip")
    return folder


def rows_of(folder) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in read_metrics(folder / "metrics.jsonl")}


def test_a_tokenizer_is_measured_with_its_averaged_weights_where_checkpoints_are_saved(tmp_path):
    config = tokenizer_config(tmp_path / "run", validation=HELD_OUT, training={"log_every": 4})
    rows = rows_of(train(config))
    assert [step for step, row in rows.items() if "val_loss" in row] == [3, 6] == [step for step in rows if step != 4]
    assert {"val_l2", "val_codebook", "val_psnr"} <= rows[6].keys()
    images = open_source(DataConfig(16, source="digits", channels=1, split="test", limit=50))
    pixels = example_batch(images, DataConfig(16, source="digits", channels=1), 50).pixels
    exported = vistok.load(tmp_path / "run" / "tokenizer")
    assert rows[6]["val_psnr"] == pytest.approx(psnr(exported.reconstruct(pixels), pixels).item(), abs=1e-3)


def test_a_generator_is_measured_on_the_first_view_of_other_tokens(tmp_path, tokens, held_out_tokens):
    still = {"optimizer": {"lr": 0.0}, "training": {"ema_decay": 0.0, "save_every": 1}}
    config = generator_config(tmp_path / "run", tokens, validation={"tokens": str(held_out_tokens)}, **still)
    rows = rows_of(train(config))
    assert len({row["val_loss"] for row in rows.values()}) == 1
    model = vistok.pipeline(tmp_path / "run").generator
    ids, labels = TokenCache(held_out_tokens).batch(range(50), [0] * 50)
    with torch.no_grad():
        loss = model(ids, Condition.from_labels(labels), draws=None).loss  # no class is dropped
    assert model.condition_dropout > 0
    assert rows[1]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert "val_accuracy" in rows[1]


def test_held_out_batches_of_a_generator_share_no_draws(tmp_path, tokens, held_out_tokens, monkeypatch):
    """MAR draws one masked share per batch: with one share for all batches, only one task would be measured."""
    from vistok.generators.llama import Llama

    draw, drawn = Llama.training_draws, []

    def recorded(self, keys):
        drawn.append(keys.step)
        return draw(self, keys)

    monkeypatch.setattr(Llama, "training_draws", recorded)
    validation = {"tokens": str(held_out_tokens)}
    train(generator_config(tmp_path / "run", tokens, validation=validation, training={"max_steps": 2, "save_every": 1}))
    assert drawn == [0, *range(4), 1, *range(4)]


def test_the_best_by_validation_stays_and_can_be_loaded(tmp_path):
    changes = {"optimizer": {"lr": 0.02}, "training": {"save_every": 1, "keep_checkpoints": 1, "ema_decay": 0.0}}
    folder = train(tokenizer_config(tmp_path / "run", validation=HELD_OUT, **changes))
    by_step = {step: row["val_psnr"] for step, row in rows_of(folder).items()}
    best = max(by_step, key=by_step.get)
    assert best < 6, "the rate is meant to be too high"
    record = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert record == {"step": best, "metric": "val_psnr", "value": by_step[best]}
    state = torch.load(folder / "checkpoints" / f"step-{best:07d}" / "state.pt", weights_only=True)
    loaded = vistok.load(folder / "best" / "tokenizer").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state["model"].items())


def test_a_best_model_that_was_not_exported_is_when_the_run_resumes(tmp_path, monkeypatch):
    def full_disk(self, folder, model, export=TokenizerTask.export):
        if folder.name == "best":
            raise OSError(28, "No space left on device")
        export(self, folder, model)

    config = tokenizer_config(tmp_path / "run", validation=HELD_OUT, optimizer={"lr": 0.0})  # the first stays the best
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "export", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left.*step-0000003.*--resume"):
            train(config)
    train(config, resume=True)
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"] == 3
    assert vistok.load(tmp_path / "run" / "best" / "tokenizer")


def test_a_checkpoint_that_was_not_judged_is_when_the_run_resumes(tmp_path, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    config = tokenizer_config(tmp_path / "run", validation=HELD_OUT, optimizer={"lr": 0.0})  # the first stays the best
    with monkeypatch.context() as patch:
        patch.setattr("vistok.train.checkpoints.write_json", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            train(config)
    train(config, resume=True)
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"] == 3


def test_a_checkpoint_from_before_validation_is_not_exported_as_the_best(tmp_path):
    train(tokenizer_config(tmp_path / "run"))
    train(tokenizer_config(tmp_path / "run", validation=HELD_OUT), resume=True)  # after its last step
    assert not (tmp_path / "run" / "best").exists()
    folder = train(tokenizer_config(tmp_path / "run", validation=HELD_OUT, training={"max_steps": 7}), resume=True)
    assert vistok.load(folder / "best" / "tokenizer")


def test_best_is_a_run_of_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tokenizer_config("best"))  # a run may also be called "best"
    assert data_of_run("best", [], input_shape=(3, 8, 8)).source == "digits"
    train(tokenizer_config("run", validation=HELD_OUT))
    for command in (
        ["tokenize", "run/best", "--out", "tokens", "data.limit=20"],
        ["eval", "run/best", "data.limit=20"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.exception


def test_a_request_to_stop_ends_validation_and_saves(tmp_path, monkeypatch):
    terms, measured = TokenizerTask._held_out_terms, []

    def slow(self, learner, batch, clock, number):
        measured.append(clock.step)
        os.kill(os.getpid(), signal.SIGTERM)
        return terms(self, learner, batch, clock, number)

    config = tokenizer_config(tmp_path / "run", validation=HELD_OUT, data={"batch_size": 8})
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "_held_out_terms", slow)
        with pytest.raises(TrainingInterrupted, match="SIGTERM after step 4"):
            train(config)
    assert measured == [3], "the other batches are not waited for"
    assert not (tmp_path / "run" / "checkpoints" / "best.json").exists()
    rows = rows_of(train(config, resume=True))
    assert [step for step, row in rows.items() if "val_loss" in row] == [6]


def test_resume_measures_what_it_would_have(tmp_path):
    config = tokenizer_config(tmp_path / "whole", validation=HELD_OUT)
    whole = rows_of(train(config))
    config = tokenizer_config(tmp_path / "part", validation=HELD_OUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.optimise", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = rows_of(train(config, resume=True))
    changing = {"seconds", "images_per_second"}
    for step, row in whole.items():
        assert {k: v for k, v in row.items() if k not in changing} == {
            k: v for k, v in resumed[step].items() if k not in changing
        }


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"data": {"split": "train"}}, r"names the images that the run trains on"),
        ({"data": {"limit": 50, "batch_size": 5}}, r"names the images that the run trains on"),
        ({"data": {"split": "test", "image_size": 8}}, r"validation\.data\.image_size is 8, .* 16; leave the key out"),
        ({"data": {"split": "test", "channels": 3}}, r"validation\.data\.channels is 3, .* 1; leave the key out"),
        ({"data": {"splitt": "test"}}, r"validation\.data.*splitt"),
        ({"tokens": "cache/"}, r"validation has tokens, but this task reads 'data'; .* validation\.data\.split=test"),
        ({}, r"validation has nothing"),
    ],
)
def test_validation_that_a_tokenizer_cannot_have(tmp_path, validation, message):
    with pytest.raises(ConfigError, match=message):
        train(tokenizer_config(tmp_path / "run", validation=validation))
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_held_out_images_is_not_blamed_on_the_others(tmp_path):
    for data, message in (({"source": "folder"}, "needs data.root"), ({"limit": 0}, "limit must be at least 1")):
        with pytest.raises(ValueError, match=message) as caught:
            train(tokenizer_config(tmp_path / "run", validation={"data": data}))
        assert caught.value.__notes__ == ["This is about the held-out images, whose keys are below validation.data."]


def test_tokens_of_the_images_that_the_run_trains_on(tmp_path, tokens):
    from vistok.pipelines.folders import load_tokenizer

    other_views = tmp_path / "other_views"
    tokenize(load_tokenizer(tokens), DataConfig(16, source="digits", channels=1, limit=200), other_views)
    for folder in (tokens, other_views):
        with pytest.raises(ConfigError, match=r"validation\.tokens: .* the images that the run trains on"):
            train(generator_config(tmp_path / "run", tokens, validation={"tokens": str(folder)}))


@pytest.mark.parametrize("size", [16, None], ids=["ids", "latents"])
def test_copies_among_held_out_tokens_are_counted(tmp_path, size):
    spec = TokenSpec(4, 1000 if size else None, dim=3)
    shape = (60, 2, 4) if size else (60, 2, 4, 3)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tokens = (drawn * 1000).long() if size else drawn
    caches = {"trained": range(40), "copy": [3, 5, 39], "some": [50, 39, 51, 52, 5], "other": range(40, 60)}
    for name, rows in caches.items():
        with TokenWriter(tmp_path / name, asdict(spec), "abc", views=2, source_fingerprint=name) as writer:
            noise = 0 if size else 1e-6  # another batch size rounds otherwise
            writer.write(tokens[list(rows)].flip(1) + noise, torch.full((len(rows),), -1))
    trained = [TokenCache(tmp_path / "trained")]
    shared = {name: shared_tokens(trained, TokenCache(tmp_path / name)) for name in caches}
    assert [(s.found, s.looked_at) for s in shared.values()] == [(40, 40), (3, 3), (2, 5), (0, 20)]
    assert [s.is_whole for s in shared.values()] == [True, True, False, False]
    assert str(shared["some"]) == (
        f"2 of 5 held-out samples that were looked for are trained on: {tmp_path / 'some'}[1]"
    )


def test_equal_tokens_of_samples_that_look_alike_are_no_proof(tmp_path):
    for name in ("trained", "held_out"):
        with TokenWriter(tmp_path / name, asdict(TokenSpec(1, 2, dim=1)), "abc", source_fingerprint=name) as writer:
            writer.write(torch.arange(20)[:, None, None] % 2, torch.full((20,), -1))
    shared = shared_tokens([TokenCache(tmp_path / "trained")], TokenCache(tmp_path / "held_out"))
    assert (shared.found, shared.is_whole) == (20, False)
    assert "or look alike" in str(shared)


def test_a_copy_of_a_token_cache_that_hides_its_images_is_not_held_out(tmp_path, tokens):
    copy = tmp_path / "copy"
    shutil.copytree(tokens, copy)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"source": "others"}))
    spread = np.random.default_rng(0).integers(0, 32, (200, 2, 4)).astype(np.uint16)
    for folder in (copy, shutil.copytree(tokens, tmp_path / "trained")):
        np.save(folder / "tokens-00000.npy", spread)
    config = generator_config(tmp_path / "run", tmp_path / "trained", validation={"tokens": str(copy)})
    with pytest.raises(ConfigError, match="the images that the run trains on"):
        train(config)


def test_tokens_of_another_tokenizer_or_of_other_classes(tmp_path, tokens):
    data = DataConfig(16, source="digits", channels=1, split="test", limit=50)
    torch.manual_seed(1)
    foreign = ViTVQGAN(16, 8, ViTConfig(**TINY), ViTConfig(**TINY), 32, 4, in_channels=1)
    tokenize(foreign, data, tmp_path / "foreign")
    with pytest.raises(TokenCacheError, match="made by another tokenizer"):
        train(generator_config(tmp_path / "run", tokens, validation={"tokens": str(tmp_path / "foreign")}))

    index = tokens / "index.json"
    classes = {**json.loads(index.read_text()), "classes": [str(10 - i) for i in range(10)]}
    (tmp_path / "renamed").mkdir()
    for path in tokens.iterdir():
        if path != index:
            (tmp_path / "renamed" / path.name).symlink_to(path)
    (tmp_path / "renamed" / "index.json").write_text(json.dumps(classes))
    with pytest.raises(ConfigError, match=r"other classes .*\(0, 10\), so its labels"):
        train(generator_config(tmp_path / "run", tokens, validation={"tokens": str(tmp_path / "renamed")}))


def test_an_unknown_held_out_metric_is_refused_before_the_first_checkpoint(tmp_path):
    training = {"best_metric": "val_psnrr"}
    with pytest.raises(ConfigError, match="no 'val_psnrr'; did you mean 'val_psnr'"):
        train(tokenizer_config(tmp_path / "run", validation=HELD_OUT, training=training))
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "the first row of the log shows it"


def test_a_metric_that_is_not_measured_on_held_out_samples_is_refused_at_the_first_checkpoint(tmp_path):
    training = {"best_metric": "val_grad_norm"}
    with pytest.raises(ConfigError, match=r"no 'val_grad_norm'.*val_psnr"):
        train(tokenizer_config(tmp_path / "run", validation=HELD_OUT, training=training))


def test_a_held_out_metric_without_held_out_samples_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"best_metric is 'val_psnr', .* validation\.data\.split=test"):
        train(tokenizer_config(tmp_path / "run", training={"best_metric": "val_psnr"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_checkpoint_whose_held_out_loss_is_not_finite_is_not_the_best(tmp_path, monkeypatch, caplog, bad):
    measure = TokenizerTask.validate

    def validate(self, learner, clock, stopping):
        found = measure(self, learner, clock, stopping)
        return found | dict.fromkeys(("val_loss", "val_psnr"), bad) if clock.step < 6 else found

    monkeypatch.setattr(TokenizerTask, "validate", validate)
    folder = train(tokenizer_config(tmp_path / "run", validation=HELD_OUT))
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["step"] == 6
    assert f"val_psnr is {bad} after step 3" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="signals as on Linux")
def test_a_killed_process_that_reads_held_out_images_is_named(tmp_path, monkeypatch):
    measure = TokenizerTask.validate

    def validate(self, learner, clock, stopping):
        if clock.step == 6:
            [worker] = self.held_out._loader._iterator._workers
            os.kill(worker.pid, signal.SIGKILL)
        return measure(self, learner, clock, stopping)

    monkeypatch.setattr(TokenizerTask, "validate", validate)
    validation = {"data": HELD_OUT["data"] | {"num_workers": 1}}
    with pytest.raises(LoaderWorkerError, match=r"was killed by SIGKILL.*step-0000003.*--resume"):
        train(tokenizer_config(tmp_path / "run", validation=validation))


def test_unreadable_held_out_images_are_named_when_met_and_at_the_end(tmp_path, caplog):
    fill_folder(tmp_path / "photos", {"ant": 101})
    (tmp_path / "photos" / "ant" / "007.png").write_bytes(b"no image")
    held_out = {"data": {"source": "folder", "root": str(tmp_path / "photos")}}
    rows = rows_of(train(tokenizer_config(tmp_path / "run", validation=held_out)))
    assert rows[6]["val_loss"] > 0
    assert caplog.text.count("left out, cannot be read") == 1
    assert "1 samples could not be read and were left out of validation" in caplog.text
    assert "007.png" in caplog.text.rpartition("left out of validation")[2]


def test_too_many_unreadable_held_out_images_end_a_run_that_is_saved(tmp_path):
    fill_folder(tmp_path / "photos", {"ant": 20})
    (tmp_path / "photos" / "ant" / "007.png").write_bytes(b"no image")
    held_out = {"data": {"source": "folder", "root": str(tmp_path / "photos")}}
    config = tokenizer_config(tmp_path / "run", validation=held_out)
    with pytest.raises(TooManyUnreadableError, match=r"(?s)1 of 20 samples .*007\.png") as caught:
        train(config)
    assert "held-out images; what was trained is saved" in caught.value.__notes__[0]
    assert "step-0000003" in caught.value.__notes__[0]
    (tmp_path / "photos" / "ant" / "007.png").unlink()
    assert rows_of(train(config, resume=True))[6]["val_loss"] > 0


def test_a_dry_run_counts_held_out_samples(tmp_path):
    save_config(tokenizer_config(tmp_path / "run", validation=HELD_OUT), tmp_path / "run.yaml")
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert "held-out samples" in shown.output
    assert " 50" in shown.output.split("held-out samples")[1].splitlines()[0]


def save_pictures(folder, numbers):
    from support.images import picture

    folder.mkdir(parents=True)
    for number in numbers:
        picture(number, (16, 16)).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize(
    "name", ["./x/train", "x/../x/train", "x/link", "copy", "copy.zip", "links", "hard_links", "some"]
)
def test_held_out_images_are_compared_by_what_they_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = save_pictures(tmp_path / "x" / "train", range(20))
    (tmp_path / "x" / "link").symlink_to("train")
    shutil.copytree(folder, tmp_path / "copy")
    shutil.make_archive("copy", "zip", folder)
    for other in ("links", "hard_links", "some"):
        (tmp_path / other).mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (tmp_path / "links" / f"{number}.PNG").symlink_to(path)
        (tmp_path / "hard_links" / f"{number}.PNG").hardlink_to(path)
        if number % 3 == 0:
            shutil.copy(path, tmp_path / "some" / f"x{number}.png")
    data = {"source": "folder", "root": "x/train", "channels": 3, "split": None, "affine": None}
    config = tokenizer_config(tmp_path / "run", data=data, validation={"data": {"root": name}})
    with pytest.raises(ConfigError, match="names the images that the run trains on, by another name or in a copy"):
        train(config)


def test_held_out_images_of_other_classes_are_told(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "val/images", "test/cat", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name / "0.png")
    data = DataConfig(16, root=str(tmp_path))
    for split, told in (("test", False), ("val", True)):
        caplog.clear()
        held_out_images(data, open_source(data), {"split": split})
        assert ("other classes (images) than the trained ones (cat, dog)" in caplog.text) == told


def test_copies_among_held_out_images_are_counted(tmp_path, caplog):
    save_pictures(tmp_path / "train", range(20))
    save_pictures(tmp_path / "test", range(17, 25))
    data = {"source": "folder", "root": str(tmp_path), "channels": 3, "affine": None, "batch_size": 4}
    config = tokenizer_config(tmp_path / "run", data=data, validation={"data": {"split": "test"}})
    with caplog.at_level("WARNING"):
        train(config | {"training": {"max_steps": 1}})
    assert "3 of 8 held-out samples that were looked for are trained on: " in caplog.text
    assert f"{tmp_path}/test/017.png" in caplog.text


def test_copies_among_held_out_videos_are_counted(tmp_path):
    def videos(folder: str, numbers: range) -> VideoSource:
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / f"{number}.mp4" for number in numbers] + [tmp_path / folder / "frames"]
        for number, path in zip([*numbers, max(numbers)], paths, strict=True):
            if path.suffix:
                path.write_bytes(bytes([number]) * 100)
            else:
                save_pictures(path, range(number))
        return VideoSource(paths, [-1] * len(paths))

    trained = videos("trained", range(8))
    assert shared_images(trained, videos("copy", range(8))).is_whole
    some = shared_images(SelectedClips(trained, range(7)), videos("some", range(6, 9)))
    assert (some.found, some.looked_at, some.example) == (1, 4, str(tmp_path / "some" / "6.mp4"))


def test_held_out_digits_of_the_whole_set_are_counted(tmp_path):
    config = tokenizer_config(tmp_path / "run", data={"split": None}, validation={"data": {"split": "test"}})
    with pytest.raises(ConfigError, match="names the images that the run trains on, by another name"):
        train(config)


def photo(number: int) -> Image.Image:
    small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 64), Image.Resampling.BICUBIC)


def save_photos(folder: Path, numbers: range, suffix: str = ".jpg", **options: Any) -> Path:
    (folder / "cat").mkdir(parents=True)
    for number in numbers:
        photo(number).save(folder / "cat" / f"{number:03d}{suffix}", **options)
    return folder


def encoded_anew(
    folder: Path,
    target: Path,
    suffix: str,
    *,
    name: str = "{}",
    side: int = 96,
    mirrored: bool = False,
    **options: Any,
) -> Path:
    (target / "cat").mkdir(parents=True)
    for path in folder.glob("cat/*.jpg"):
        with Image.open(path) as image:
            copy = image.resize((side, side * 2 // 3), Image.Resampling.BOX)
        copy = copy.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else copy
        copy.save(target / "cat" / (name.format(path.stem) + suffix), **options)
    return target


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {}),
        (".PNG", {"name": "other_name_{}"}),
        (".jpg", {"quality": 50}),
        (".webp", {"quality": 60}),
        (".bmp", {"side": 48}),
        (".png", {"mirrored": True, "name": "mirrored_{}"}),
    ],
)
def test_held_out_images_that_were_encoded_anew_are_not_held_out(tmp_path, suffix, options):
    folder = save_photos(tmp_path / "train", range(20))
    copy = encoded_anew(folder, tmp_path / "copy", suffix, **options)
    data = DataConfig(16, root=str(folder), split=None)
    shutil.make_archive(str(tmp_path / "packed"), "zip", copy)
    with tarfile.open(tmp_path / "packed.tar", "w") as shard:
        for path in copy.glob("cat/*"):
            shard.add(path, path.name)
    for held_out in (
        {"root": str(copy)},
        {"root": str(tmp_path / "packed.zip")},
        {"source": "webdataset", "root": str(tmp_path / "packed.tar")},
    ):
        with pytest.raises(
            ConfigError, match=r"images that the run trains on.*, which looks like .*train/cat/\d+\.jpg"
        ):
            held_out_images(data, open_source(data), held_out)


def test_files_of_images_that_have_a_name_are_not_held_out(tmp_path):
    data = DataConfig(16, source="digits", channels=1)
    digits = open_source(data)
    for number in range(0, len(digits), 50):
        digits[number][0].save(tmp_path / f"{number}.png")
    with pytest.raises(ConfigError, match=r"images that the run trains on.*0\.png, which looks like digits/0"):
        held_out_images(data, digits, {"source": "folder", "root": str(tmp_path), "split": None})


def test_held_out_images_that_look_like_trained_ones_are_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vistok.data.overlap.MOST_DECODED", 4)  # others are found by their names
    folder = save_photos(tmp_path / "train", range(20))
    save_photos(tmp_path / "held_out", range(100, 110))
    for number in (3, 7):
        photo(number).save(tmp_path / "held_out" / "cat" / f"{number:03d}.png")
    data = DataConfig(16, root=str(folder), split=None)
    held_out_images(data, open_source(data), {"root": str(tmp_path / "held_out")})
    assert "2 of 12 held-out samples that were looked for are trained on: " in caplog.text
    caplog.clear()
    save_photos(tmp_path / "others", range(200, 230))
    held_out_images(data, open_source(data), {"root": str(tmp_path / "others")})
    assert not caplog.text


def test_images_of_one_colour_are_no_copies(tmp_path, caplog):
    for name, width in (("train", 16), ("held_out", 18)):  # other bytes
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (width, 16), (100 + number,) * 3).save(tmp_path / name / f"{number}.png")
    data = DataConfig(16, root=str(tmp_path / "train"), split=None)
    held_out_images(data, open_source(data), {"root": str(tmp_path / "held_out")})
    assert not caplog.text
