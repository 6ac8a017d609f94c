"""``vistok probe`` and ``vistok compare``: tokenizers judged alone and with a small generator."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.images import fill_folder
from support.tiny_models import tiny

from vistok.cli import main
from vistok.config import load_config, save_config
from vistok.draws import Keys
from vistok.pipelines.folders import TOKENIZER
from vistok.probing import ProbeSettings, compare, probe
from vistok.probing import tokenizer as timing
from vistok.probing.generator import CONFIGS
from vistok.probing.linear import linear_probe
from vistok.probing.networks import choose_network
from vistok.probing.report import table
from vistok.probing.tokenizer import bits
from vistok.types import TokenSpec
from vistok.utils.outputs import ResumeError

QUICK = ProbeSettings(steps=2, train_images=60, test_images=30, network="none", batch_size=8)
DIGITS = ["data.source=digits", "data.channels=1", "data.image_size=16"]


@pytest.fixture(autouse=True)
def small_generators(tmp_path, monkeypatch):
    """The generators of probes, smaller still."""
    small = tmp_path / "generators"
    small.mkdir()
    for name, changes in (
        ("discrete", {"num_layers": 2}),
        ("continuous", {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_head_layers": 1, "head_dim": 16}),
    ):
        config = load_config(CONFIGS / f"{name}.yaml")
        config["model"] |= changes | {"dim": 16, "num_heads": 2}
        save_config(config, small / f"{name}.yaml")
    monkeypatch.setattr("vistok.probing.generator.CONFIGS", small)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By name, untrained tokenizers of grey images of 16 px, saved as runs save them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    models = {
        "ids": tiny("vit_vqgan", image_size=16, in_channels=1),
        "latents": tiny("kl_vae", image_size=16, in_channels=1),
        "small": tiny("vit_vqgan", image_size=8, in_channels=1),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name / TOKENIZER)
    return {name: str(folder / name) for name in models}


def test_a_linear_probe_finds_a_linear_rule_and_no_rule_in_noise():
    features, noise = (Keys.range(seed, 400).normal("x", 6) for seed in (0, 1))
    labels = (features[:, 0] + 0.5 * features[:, 1] > 0).long()
    told = linear_probe(features[:300], labels[:300], features[300:], labels[300:])
    assert told["accuracy"] > 0.95
    assert (told["channels"], told["fitted"], told["scored"]) == (6, 300, 100)
    assert 0.3 < linear_probe(noise[:300], labels[:300], noise[300:], labels[300:])["accuracy"] < 0.7
    # The probe must not depend on the scale and offset of a channel.
    moved = features * torch.logspace(0, 3, 6) + 5
    assert linear_probe(moved[:300], labels[:300], moved[300:], labels[300:])["accuracy"] == told["accuracy"]


@pytest.mark.parametrize("labels", [torch.arange(10), torch.arange(10) // 9, (torch.arange(10) % 5) // 4])
def test_a_linear_probe_of_few_samples_takes_the_usual_penalty(labels):
    features = Keys.range(0, 10).normal("x", 6)
    assert linear_probe(features, labels, features, labels)["penalty"] == 1.0


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.randn(20, 3), torch.zeros(20), "at least two classes"),
        (torch.randn(4, 3), torch.arange(4), "at least ten samples"),
        (torch.full((20, 3), torch.nan), torch.arange(20) % 2, "not finite"),
    ],
)
def test_a_linear_probe_refuses(features, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(features, labels, features, labels)


def test_bits_are_those_of_all_ids():
    assert bits(TokenSpec(16, 1024, dim=4)) == 160
    assert bits(TokenSpec(16, 1024, dim=4, depth=3)) == 480
    assert bits(TokenSpec(16, None, dim=4)) is None


def test_probe_measures_and_goes_on_where_it_stopped(saved, tmp_path, monkeypatch):
    told = probe(saved["ids"], tmp_path / "probe", DIGITS, settings=QUICK)
    assert told["reconstruction"]["scores"]["psnr"] > 0
    assert told["tokenizer"]["bits_per_image"] == bits(TokenSpec(**told["tokenizer"]["spec"]))
    generator = told["generator"]
    assert generator["loss_per_image"] == pytest.approx(
        generator["loss_per_token"] * told["tokenizer"]["spec"]["length"]
    )
    assert 0 < generator["loss_per_token"] < generator["uniform_loss"] + 1
    assert generator["probe"]["scored"] == 30
    assert {"tokens", "latents", "decoded"} <= told["feature_probes"].keys()
    assert 0 < told["code_usage"]["used"] <= 1
    written = json.loads((tmp_path / "probe" / "result.json").read_text())
    assert written["generator"] == generator
    assert "loss/token" in (tmp_path / "probe" / "report.html").read_text()

    def must_not(*arguments, **options):
        raise AssertionError("measured twice")

    monkeypatch.setattr("vistok.probing.run.reconstruction", must_not)
    again = probe(saved["ids"], tmp_path / "probe", DIGITS, settings=QUICK)
    assert again["generator"] == generator
    with pytest.raises(ResumeError, match="steps was 2 and is now 3"):
        probe(saved["ids"], tmp_path / "probe", DIGITS, settings=replace(QUICK, steps=3))


def test_a_killed_probe_keeps_its_tokens(saved, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vistok.probing.run.probe_generator", killed)
        with pytest.raises(KeyboardInterrupt):
            probe(saved["ids"], tmp_path / "probe", DIGITS, settings=QUICK)
    monkeypatch.setattr("vistok.probing.run.tokenize", killed)
    assert probe(saved["ids"], tmp_path / "probe", DIGITS, settings=QUICK)["generator"]["steps"] == 2


def test_compare_sets_ids_beside_latents(saved, tmp_path):
    told = compare([saved["ids"], saved["latents"]], tmp_path / "compare", DIGITS, settings=QUICK)
    ids, latents = table(told["tokenizers"])
    assert ids.keys() == latents.keys()
    assert (ids["bits/image"] is None, latents["bits/image"] is None) == (False, True)
    assert latents["codes used"] is None
    assert min(ids["loss/token"], latents["loss/token"], ids["psnr"], latents["psnr"]) > 0
    page = (tmp_path / "compare" / "report.html").read_text()
    assert page.count("<figure>") == 2
    assert "no common measure" in page


def test_a_tokenizer_of_images_is_judged_on_clips_frame_by_frame(tmp_path):
    tiny("vit_vqgan", image_size=16, in_channels=1).save_pretrained(tmp_path / "saved" / TOKENIZER)
    data = [
        "data.source=moving_digits",
        "data.channels=1",
        "data.image_size=16",
        "data.num_frames=2",
        "data.batch_size=8",
    ]
    settings = replace(QUICK, steps=0, train_images=12, test_images=10)
    told = probe(str(tmp_path / "saved"), tmp_path / "probe", data, settings=settings)
    assert told["tokenizer"]["model"] == "framewise"
    assert told["tokenizer"]["spec"]["grid"][0] == 2
    assert told["reconstruction"]["scores"]["psnr_frames"] > 0


def test_each_medium_has_its_networks():
    assert choose_network(None, clips=False) == "efficientnet_lite0"
    assert choose_network(None, clips=True) == "none"
    with pytest.raises(ValueError, match="unknown network 'efficientnet_lite0'; clips have i3d"):
        choose_network("efficientnet_lite0", clips=True)


def test_the_clock_starts_when_the_device_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: done.append("waited"))
    monkeypatch.setattr(timing, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: done.append("clock") or len(done))
    timing._rate(lambda: done.append("work"), torch.empty(2, device="meta"))
    assert done == ["work", "waited", "clock", "work", "waited", "clock", "clock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "ids"], "at least two different tokenizers"),
        (["compare", "ids", "ids"], "at least two different tokenizers"),
        (["compare", "ids", "small"], "cannot be compared with"),
        (["probe", "ids", "--network", "vgg"], "unknown network 'vgg'; images have efficientnet_lite0"),
        (["probe", "ids", "--network", "i3d"], "unknown network 'i3d'; images have efficientnet_lite0"),
        (["probe", "ids", "--test-split", "train"], "scored on what it was fitted to"),
        (["probe", "ids", "--steps", "-1"], "steps must be at least 0"),
        (["probe", "ids", "--train-images", "3"], "train_images must be at least 10"),
    ],
)
def test_bad_input_is_named(saved, tmp_path, capsys, arguments, message):
    command, *rest = (saved.get(part, part) for part in arguments)
    data = DIGITS if command == "probe" else [part for value in DIGITS for part in ("--set", value)]
    small = ["--train-images", "20", "--test-images", "10"] if "--train-images" not in rest else []
    with pytest.raises(SystemExit) as exit_code:
        main([command, *rest, *data, "--out", str(tmp_path / "out"), *small])
    assert exit_code.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_splits_of_the_same_images_are_refused(tmp_path, saved):
    for split in ("train", "val"):
        fill_folder(tmp_path / "data" / split, {"cat": 10, "dog": 10})
    data = [f"data.root={tmp_path / 'data'}", "data.channels=1", "data.image_size=16"]
    settings = replace(QUICK, steps=0, test_split="val")
    with pytest.raises(
        ValueError, match=r"scored on what it was fitted to: 'val' has the images of 'train'.*val/cat/000"
    ):
        probe(saved["ids"], tmp_path / "probe", data, settings=settings)
    assert not (tmp_path / "probe").exists()
