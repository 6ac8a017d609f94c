"""From released weights to a picture: convert, combine, sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.released import tiny_tokenizer, write_generator, write_tokenizer
from support.tiny_models import tiny
from support.tiny_runs import generator_config, saved_steps, tokenizer_config, write_tokens
from support.tiny_text import save_tiny_clip, save_tiny_t5

import vistok
from vistok.checkpoints import CheckpointError, imagenet
from vistok.cli import main
from vistok.pipelines import assemble
from vistok.text.encoders import CleaningEncoder
from vistok.text.prompts import KINDS
from vistok.train import train


def command(*arguments: object) -> None:
    """Run a command that succeeds."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert not exit.value.code


def grid_of(folder: Path) -> bytes:
    with Image.open(folder / "grid.png") as image:
        return image.tobytes()


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path]:
    """A tokenizer and a generator that `vistok convert` made of released-looking files."""
    folder = tmp_path_factory.mktemp("released")
    file, config = write_tokenizer(folder, tiny_tokenizer())
    command("convert", "vit_vqgan/tokenizer", file, "--config", config, "--out", folder / "tokenizer")
    file, config = write_generator(folder)
    command("convert", "llamagen/gpt", file, "--config", config, "--out", folder / "gpt")
    return folder / "tokenizer", folder / "gpt"


def test_converted_parts_become_a_pipeline_that_knows_imagenets_classes(converted, tmp_path):
    command("pipeline", *converted, "--out", tmp_path / "pipe", "top_k=10")
    command("sample", tmp_path / "pipe", "--classes", "goldfish,tench", "--num", 4, "--out", tmp_path / "a")
    command("sample", converted[1], "--tokenizer", converted[0], "--classes", "1,0", "--num", 4, "top_k=10",
            "--out", tmp_path / "b")  # fmt: skip
    assert grid_of(tmp_path / "a") == grid_of(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["labels"] == [1, 0, 1, 0]
    pipe = vistok.pipeline(*converted)
    assert pipe(["goldfish"]).labels == [1]
    assert len(pipe.class_names) == 1000
    with pytest.raises(ValueError, match=r"'crane' is ambiguous; give its id .134: crane; 517: crane"):
        pipe(["crane"])


def test_the_class_names_are_those_of_torchvision():
    from torchvision.models import ResNet18_Weights

    ours, theirs = imagenet.class_names(), ResNet18_Weights.DEFAULT.meta["categories"]
    differing = [
        (name, other)
        for name, other in zip(ours, theirs, strict=True)
        if other.lower() not in [synonym.strip().lower() for synonym in name.split(",")]
    ]
    assert differing == [("crane", "crane bird"), ("maillot, tank suit", "maillot tank suit")]


def test_an_official_generators_id_brings_its_tokenizer(converted, monkeypatch):
    asked = []

    def fetch(source):
        asked.append(str(source))
        return vistok.load(converted["c2i_B" in str(source)])

    monkeypatch.setattr("vistok.pipelines.folders.load", fetch)
    pipe = vistok.pipeline("FoundationVision/LlamaGen/c2i_B_256.pt")
    assert asked == ["FoundationVision/LlamaGen/vq_ds16_c2i.pt", "FoundationVision/LlamaGen/c2i_B_256.pt"]
    assert pipe(["goldfish"]).labels == [1]


def test_an_official_text_to_image_generator_brings_its_text_encoder(monkeypatch, tmp_path):
    opened, t5 = [], save_tiny_t5(tmp_path / "t5")

    def fetch(source):
        if "vq_ds16" in str(source):
            return tiny("llamagen_vq")
        return tiny("llama", spec=tiny("llamagen_vq").spec, num_classes=0, caption_dim=16, caption_length=7)

    def encoder(name, length):
        opened.append((name, length))
        return CleaningEncoder(str(t5), length)

    monkeypatch.setattr("vistok.pipelines.folders.load", fetch)
    monkeypatch.setitem(KINDS, "cleaning", encoder)
    pipe = vistok.pipeline("peizesun/llamagen_t2i/t2i_XL_stage1_256.pt")
    assert pipe(num_images=1).prompts is None
    assert opened == []  # the text encoder is large, so it is opened only for a prompt
    made = pipe(prompt="A <b>red</b> cat", num_images_per_prompt=2, guidance_scale=2.0)
    assert opened == [("google/flan-t5-xl", 7)]
    assert made.tokens.shape == (2, 16)
    pipe.save_pretrained(tmp_path / "pipe")
    monkeypatch.undo()
    copy = vistok.pipeline(tmp_path / "pipe")
    assert torch.equal(copy(prompt="a red cat", guidance_scale=2.0).tokens, made.tokens[:1])


def test_a_folder_of_parts_takes_a_text_encoder(tmp_path):
    codec = tiny("llamagen_vq")
    codec.save_pretrained(tmp_path / "vq")
    for name, sizes in (("t2i", {"caption_dim": 16}), ("narrow", {"caption_dim": 8}), ("classes", {"num_classes": 5})):
        arguments = {"num_classes": 0, "caption_length": 7, **sizes}
        tiny("llama", spec=codec.spec, **arguments).save_pretrained(tmp_path / name)
    text = ("--text-encoder", save_tiny_t5(tmp_path / "t5"))
    command(
        "pipeline", tmp_path / "vq", tmp_path / "t2i", "--out", tmp_path / "pipe", "top_k=5", *text, "--clean-texts"
    )
    command("sample", tmp_path / "pipe", "--prompt", "A <i>seven</i>", "--num", 1, "--out", tmp_path / "one")
    command("sample", tmp_path / "pipe", "--prompt", "a seven", "--num", 1, "--out", tmp_path / "same")
    command("pipeline", tmp_path / "vq", tmp_path / "t2i", "--out", tmp_path / "raw", "top_k=5", *text)
    command("sample", tmp_path / "raw", "--prompt", "A <i>seven</i>", "--num", 1, "--out", tmp_path / "other")
    one, same, other = ((tmp_path / name / "000000.png").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    other = save_tiny_t5(tmp_path / "other_t5", seed=1)
    for generator, name, clean, message in (
        (tmp_path / "pipe", other, True, r"trained with features of .*t5 \(cleaning\), not of .*other_t5"),
        (tmp_path / "pipe", text[1], False, r"t5 \(cleaning\), not of .*t5 \(huggingface\)"),
        (tmp_path / "t2i", save_tiny_clip(tmp_path / "clip"), False, None),  # as many channels, encoder not recorded
        (
            tmp_path / "narrow",
            other,
            False,
            r"takes text features \(B, 7, 8\), and .*other_t5 makes text features \(B, 7, 16\)",
        ),
        (tmp_path / "classes", other, False, "takes class labels, not the features of a text encoder"),
        (tmp_path / "t2i", None, True, "name it, too"),
    ):
        if message is None:
            assert assemble(tmp_path / "vq", generator, text_encoder=str(name)).text.parts == ("features",)
            continue
        with pytest.raises(ValueError, match=message):
            assemble(tmp_path / "vq", generator, text_encoder=name and str(name), clean_texts=clean)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    tokens = write_tokens(folder / "tokens")
    return {
        "tokenizer": train(tokenizer_config(folder / "tokenizer")),
        "generator": train(generator_config(folder / "generator", tokens)),
    }


def test_runs_and_their_checkpoints_are_loaded_as_models(runs):
    for kind, run in runs.items():
        exported = vistok.load(run / kind)
        assert vistok.load(run).fingerprint() == exported.fingerprint()
        steps = [run / "checkpoints" / step for step in saved_steps(run)]
        assert vistok.load(steps[-1]).fingerprint() == exported.fingerprint()
        assert vistok.load(steps[0]).fingerprint() != exported.fingerprint()


def test_a_checkpoint_is_sampled_before_its_run_has_ended(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.train.loop.Trainer.export", lambda self: None)
    tokens = runs["generator"].parent / "tokens"
    run = train(generator_config(tmp_path / "run", tokens))
    with pytest.raises(CheckpointError, match="has not exported one yet"):
        vistok.pipeline(run)
    step = run / "checkpoints" / saved_steps(run)[-1]
    command("sample", step, "--classes", "3", "--num", 2, "--out", tmp_path / "a")
    command("sample", runs["generator"], "--classes", "3", "--num", 2, "--out", tmp_path / "b")
    assert grid_of(tmp_path / "a") == grid_of(tmp_path / "b")


def test_the_parts_of_a_pipeline_may_be_runs(runs, tmp_path):
    pipe = vistok.pipeline(runs["generator"], runs["generator"])
    assert pipe.class_names == vistok.pipeline(runs["generator"]).class_names != ()
    assert pipe.sampling == {"guidance_scale": 2.0}
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"holds a tokenizer .vit_vqgan., but a generator is needed"):
        vistok.pipeline(runs["tokenizer"], runs["tokenizer"])


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("vq_ds16_c2i.pt", "FoundationVision/LlamaGen/vq_ds16_c2i.pt"),
        ("FoundationVision/LlamaGen/vq_ds16_c2.pt", "FoundationVision/LlamaGen/vq_ds16_c2i.pt"),
        ("FoundationVision/VAR/var_d16.pth", "FoundationVision/var/var_d16.pth"),
    ],
)
def test_nearly_the_name_of_an_official_file(source, meant):
    with pytest.raises(CheckpointError, match=f"did you mean .*{meant}"):
        vistok.load(source)
