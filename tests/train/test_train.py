"""The training loop: resume, refusals, divergence, the files of a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise

import pytest
import torch
from PIL import Image
from support.tiny_models import tiny
from support.tiny_runs import (
    GAN,
    TINY,
    generator_config,
    killed_at,
    losses_of,
    saved_steps,
    tokenizer_config,
    write_tokens,
)

import vistok
from vistok.checkpoints import CheckpointError
from vistok.data import TokenCacheError
from vistok.signatures import ConfigError
from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN
from vistok.train import TrainingDivergedError, train
from vistok.train.checkpoints import Checkpoints
from vistok.train.config import SchedulerConfig
from vistok.train.monitor import read_metrics
from vistok.train.optim import lr_factor

pytestmark = pytest.mark.usefixtures("one_thread")


def test_run_folder(tmp_path):
    folder = train(tokenizer_config(tmp_path / "run"))
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"loss", "l2", "codebook", "commitment", "psnr", "codebook_usage", "perplexity", "lr", "seconds"} <= set(
        rows[0]
    )
    assert json.loads((folder / "environment.json").read_text())["vistok"] == vistok.__version__
    picture = Image.open(folder / "images" / "step-0000006.png")
    assert picture.width > picture.height  # eight originals over eight reconstructions
    tokenizer = vistok.load(folder / "tokenizer")
    assert isinstance(tokenizer, ViTVQGAN)
    assert tokenizer.input_shape == (1, 16, 16)
    assert list((folder / "tensorboard").rglob("events*"))


@pytest.mark.parametrize("losses", [{}, {"gan": GAN}], ids=["plain", "gan"])
def test_resume_continues_the_same_curve(tmp_path, losses):
    whole = train(tokenizer_config(tmp_path / "whole", losses=losses))
    config = tokenizer_config(tmp_path / "part", losses=losses)
    # Stop after step 4 without a checkpoint, as a killed process would: the newest one is of step 3.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.optimise", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    part = train(config, resume=True)
    assert losses_of(part) == losses_of(whole)
    ours, theirs = (vistok.load(f / "tokenizer").state_dict() for f in (part, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_only_the_first_process_writes_into_the_run_folder(tmp_path, monkeypatch):
    config = tokenizer_config(tmp_path / "run", validation={"data": {"split": "test", "limit": 20}})
    with monkeypatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.optimise", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(config)

    def files() -> dict:
        paths = [path for path in (tmp_path / "run").rglob("*") if "tensorboard" not in path.parts]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before = files()
    monkeypatch.setattr("accelerate.Accelerator.is_main_process", False)  # as another process, beside the first
    train(config, resume=True)
    assert files() == before


def test_accumulation_equals_one_large_batch(tmp_path):
    data = {"affine": None}
    once = tokenizer_config(tmp_path / "once", data=data)
    split = tokenizer_config(tmp_path / "split", data=data | {"batch_size": 8})
    split["training"]["gradient_accumulation_steps"] = 2
    assert losses_of(train(split)) == pytest.approx(losses_of(train(once)), rel=1e-4)


def test_existing_run_is_not_overwritten(tmp_path):
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 1}))
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="--resume"):
        train(tokenizer_config(folder))
    assert (folder / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_begins_at_step_0(tmp_path, caplog):
    config = tokenizer_config(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.optimise", killed_at(2))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert saved_steps(tmp_path / "run") == []
    assert losses_of(train(config, resume=True)) == losses_of(train(tokenizer_config(tmp_path / "whole")))
    assert "no checkpoint yet" in caplog.text


def test_a_config_that_does_not_fit_leaves_the_run_as_it_was(tmp_path):
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="another shape"):
        train(tokenizer_config(folder, model={"codebook_size": 64}), resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"l3": 1.0}}, r"losses\.l3.*ViTVQGAN"),
        ({"losses": {"entropy": 1.0}}, r"losses\.entropy.*provides no such term"),
        ({"losses": {"logit_laplace": 1.0}}, r"logit_laplace.*provides no such term"),
        ({"losses": {"l2": "much"}}, r"losses\.l2.*a number"),
        ({"losses": {"gan": {"weight": 0.1, "start": 3}}}, r"losses\.gan\.start.*start_step"),
        ({"losses": {"gan": {"weight": 1, "discriminator": {"name": "patchgam"}}}}, r"did you mean 'patchgan'"),
        ({"model": {"codebok_size": 3}}, r"model\.codebok_size.*codebook_size"),
        ({"model": {"name": "vit_vqgam"}}, r"did you mean 'vit_vqgan'"),
        ({"model": {"image_size": 24}}, r"model\.image_size is 24, but the data say 16"),
        ({"optimizer": {"lr": "fast"}}, r"optimizer\.lr"),
        ({"training": {"max_steps": 0}}, r"max_steps"),
        ({"tokens": "tokens"}, r"takes no 'tokens'"),
        ({"token_weights": [1, 2]}, r"takes no 'token_weights'"),
        ({"sampling": {"top_k": 3}}, r"takes no 'sampling'"),
        ({"sampler": {}}, r"sampl"),
    ],
)
def test_bad_config_is_refused_before_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tokenizer_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_empty_losses(tmp_path):
    config = tokenizer_config(tmp_path / "run")
    config["losses"] = {}
    with pytest.raises(ConfigError, match="losses is empty"):
        train(config)


def test_divergence_stops_before_the_checkpoint(tmp_path):
    config = tokenizer_config(tmp_path / "run", optimizer={"lr": 1e30}, training={"max_grad_norm": 0, "log_every": 1})
    with pytest.raises(TrainingDivergedError, match=r"Lower optimizer\.lr"):
        train(config)
    for saved in (tmp_path / "run" / "checkpoints").glob("step-*"):
        state = torch.load(saved / "state.pt", weights_only=True)
        assert all(value.isfinite().all() for value in state["model"].values())


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    saved = torch.save

    def full(value, path):
        if value["step"] == 6:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step 6.*No space left.*step-0000003"):
        train(tokenizer_config(tmp_path / "run"))
    assert saved_steps(tmp_path / "run") == ["step-0000003"]


def test_the_newest_checkpoints_and_the_best_stay(tmp_path):
    for metric, choose in (("loss", min), ("psnr", max), ("grad_norm", min)):
        training = {"save_every": 1, "log_every": 1, "keep_checkpoints": 2, "image_every": 0, "best_metric": metric}
        folder = train(tokenizer_config(tmp_path / metric, training=training, optimizer={"lr": 0.02}))
        rows = {row["step"]: row[metric] for row in read_metrics(folder / "metrics.jsonl")}
        best = choose(rows, key=rows.get)
        assert saved_steps(folder) == [f"step-{step:07d}" for step in sorted({best, 5, 6})]
        record = json.loads((folder / "checkpoints" / "best.json").read_text())
        assert record == {"step": best, "metric": metric, "value": rows[best]}


def test_by_default_the_best_has_the_highest_psnr_and_else_the_lowest_loss(tmp_path):
    rows = [{"loss": 0.3, "psnr": 20.0}, {"loss": 0.2, "psnr": 19.0}]
    tokenizers, generators = Checkpoints(tmp_path / "a", 1, None), Checkpoints(tmp_path / "b", 1, None)
    model = tiny("vit_vqgan")
    for step, row in enumerate(rows, start=1):
        tokenizers.save(step, {}, row, model)
        generators.save(step, {}, {"loss": row["loss"]}, model)
    assert tokenizers.best() == {"step": 1, "metric": "psnr", "value": 20.0}
    assert generators.best() == {"step": 2, "metric": "loss", "value": 0.2}


def test_checkpoints_from_before_the_adversary_do_not_stay_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, None, objective_changes=(20,))
    best = []
    for step, value in {10: 20.0, 20: 21.0, 30: 18.0, 40: 19.0, 50: 18.5}.items():
        checkpoints.save(step, {}, {"psnr": value}, tiny("vit_vqgan"))
        best.append(checkpoints.best()["step"])
    assert best == [10, 20, 30, 40, 40]


def test_a_best_metric_that_is_not_logged(tmp_path):
    with pytest.raises(ConfigError, match=r"best_metric: this run logs no 'psnrr'; did you mean 'psnr'"):
        train(tokenizer_config(tmp_path / "run", training={"best_metric": "psnrr"}))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "cache")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_generator_run_is_a_pipeline_and_resumes(tmp_path, tokens, ema):
    training = {"ema_decay": ema, "image_every": 2}  # dropout must be on again after pictures
    whole = train(generator_config(tmp_path / "whole", tokens, training=training))
    config = generator_config(tmp_path / "part", tokens, training=training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.optimise", killed_at(5))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    part = train(config, resume=True)
    assert losses_of(part) == losses_of(whole)
    no_pictures = generator_config(tmp_path / "plain", tokens, training={"ema_decay": ema, "image_every": 0})
    assert losses_of(train(no_pictures)) == losses_of(whole)
    pipe = vistok.pipeline(part)
    assert pipe.class_names == tuple("0123456789")
    assert pipe.sampling == {"guidance_scale": 2.0}
    assert len(pipe(["3", 5], num_images_per_label=2).images) == 4


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokens):
    copy_of = tmp_path / "cache"
    shutil.copytree(tokens, copy_of)
    torch.manual_seed(1)
    ViTVQGAN(16, 8, ViTConfig(**TINY), ViTConfig(**TINY), 32, 4, in_channels=1).save_pretrained(copy_of / "tokenizer")
    with pytest.raises(TokenCacheError, match="another tokenizer"):
        train(generator_config(tmp_path / "run", copy_of))


def test_unknown_sampling_option_in_the_config(tmp_path, tokens):
    with pytest.raises(ConfigError, match=r"sampling\.guidence_scale.*guidance_scale"):
        train(generator_config(tmp_path / "run", tokens, sampling={"guidence_scale": 2.0}))


def test_init_from(tmp_path):
    first = train(tokenizer_config(tmp_path / "first"))
    # A learning rate of zero keeps what was loaded.
    second = train(tokenizer_config(tmp_path / "second", init_from=str(first), optimizer={"lr": 0.0}))
    ours, theirs = (vistok.load(f / "tokenizer").state_dict() for f in (second, first))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)
    best = train(
        tokenizer_config(
            tmp_path / "best", init_from=str(first / "checkpoints" / "step-0000003"), optimizer={"lr": 0.0}
        )
    )
    averaged = torch.load(first / "checkpoints" / "step-0000003" / "state.pt", weights_only=True)["average"]["model"]
    ours = vistok.load(best / "tokenizer").state_dict()
    assert all(torch.allclose(ours[key], averaged[key], atol=1e-6) for key in averaged)
    with pytest.raises(CheckpointError, match="another shape"):
        train(tokenizer_config(tmp_path / "third", init_from=str(first), model={"codebook_size": 16}))
    with pytest.raises(CheckpointError, match="no folder"):
        train(tokenizer_config(tmp_path / "fourth", init_from=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_schedules(name):
    factor = lr_factor(SchedulerConfig(name, warmup_steps=10, final_factor=0.1), 100)
    values = [factor(step) for step in range(100)]
    assert 0 < values[0] < values[9] < 1
    assert values[10] == pytest.approx(1)
    assert values[99] == (1 if name == "constant" else 0.1)  # the last step that is taken
    assert lr_factor(SchedulerConfig(name), 1)(0) == 1
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_rates_fall_at_milestones():
    config = SchedulerConfig("steps", warmup_steps=2, milestones=(4, 6), step_factor=0.5)
    factor = lr_factor(config, 8)
    assert [factor(step) for step in range(8)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 0.25])
    for name, milestones in (("steps", ()), ("steps", (6, 4)), ("cosine", (4,))):
        with pytest.raises(ValueError, match=r"milestones are the rising steps .* got \["):
            SchedulerConfig(name, milestones=milestones)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "exponential"}, "never falls to 0: set final_factor or final_lr above 0"),
        ({"name": "exponential", "final_lr": 0.0}, "never falls to 0"),
        (
            {"name": "constant", "final_lr": 1e-5},
            r"final_lr 1e-05 has no effect on .* 'constant': leave it out \(final_lr=null\)",
        ),
        ({"name": "steps", "milestones": (4,), "final_lr": 1e-5}, "has no effect on the schedule 'steps'"),
        ({"name": "cosine", "hold": 0.1}, "hold 0.1 has no effect .* choose linear or exponential by name"),
        ({"name": "linear", "bend": 0.3}, "bend 0.3 has no effect on the schedule 'linear'"),
        ({"name": "cosine", "decay_share": 0.5}, "decay_share 0.5 has no effect"),
        ({"name": "cosine", "final_lr": -1e-5}, "final_lr must be at least 0"),
    ],
)
def test_schedules_refuse_what_they_cannot_follow(options, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**options)


def test_a_rise_may_begin_anywhere_and_a_tail_fall_by_a_shape():
    config = SchedulerConfig("wsd", warmup_steps=4, warmup_from=0.2, decay_share=0.5, decay_shape="sqrt")
    values = [lr_factor(config, 9)(step) for step in range(9)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0])
    along_a_cosine = lr_factor(dataclasses.replace(config, decay_shape="cosine", final_factor=0.2), 9)
    assert [along_a_cosine(step) for step in range(4, 9)] == pytest.approx(
        [1, 0.8 * (2 + 2**0.5) / 4 + 0.2, 0.6, 0.8 * (2 - 2**0.5) / 4 + 0.2, 0.2]
    )
    with pytest.raises(ValueError, match=r"warmup_from .* got 2"):
        SchedulerConfig(warmup_from=2)
