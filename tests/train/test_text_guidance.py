"""Tokenizers whose decoder reads the captions of their images, in training."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import tokenizer_config
from support.tiny_text import save_tiny_clip, save_tiny_t5
from typer.testing import CliRunner

from vistok.cli import app
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.eval.networks import CallableNetwork
from vistok.eval.perturbation import Grid, evaluate_perturbation
from vistok.eval.tokenizers import evaluate_tokenizer
from vistok.pipelines.evaluations import score_tokenizer
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.runs import data_of_run
from vistok.pipelines.texts import conditions_of, text_of_run
from vistok.probing import ProbeSettings, compare, probe
from vistok.signatures import ConfigError
from vistok.text import TextError, open_text_encoder
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks.tokenizer import TokenizerTask
from vistok.utils.files import read_json
from vistok.utils.processes import Processes

VIT = {"dim": 16, "num_layers": 1, "num_heads": 2}
MODEL = {
    "name": "ta_titok",
    "encoder_patch_size": 8,
    "decoder_patch_size": 8,
    "encoder": VIT,
    "decoder": VIT,
    "num_tokens": 4,
    "token_dim": 4,
    "codebook_size": 32,
    "text_dim": 16,
    "text_length": 8,
}
SHORT = {"max_steps": 2, "image_every": 0, "save_every": 0, "log_every": 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def config(folder, clip, **changes) -> dict:
    changes = {"model": MODEL, "text": {"encoder": str(clip), "length": 8}, "training": SHORT} | changes
    return tokenizer_config(folder, **changes) | {"model": changes["model"]}


def test_a_clip_tower_is_read_at_all_positions(clip):
    whole, plain = open_text_encoder(str(clip), 8, "all"), open_text_encoder(str(clip), 8)
    (padded, other), (short, _) = whole.encode(["a seven", "the red bird"]), plain.encode(["a seven", "the red bird"])
    assert padded.values.shape == other.values.shape == (8, 16)
    assert len(short.values) == 4  # two words between two marks
    np.testing.assert_allclose(padded.values[:4], short.values, atol=1e-6)  # what comes behind does not change it
    from transformers import CLIPTextModel

    ids = torch.tensor([[*plain._tokenizer("a seven")["input_ids"], 0, 0, 0, 0]])
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip)(input_ids=ids).last_hidden_state[0]
    np.testing.assert_allclose(padded.values, expected.numpy(), atol=1e-6)
    assert whole.identity["kind"] == "clip"


def test_what_is_no_clip_tower(clip, tmp_path):
    with pytest.raises(TextError, match="no text tower of CLIP but t5"):
        open_text_encoder(str(save_tiny_t5(tmp_path)), 8, "all")
    with pytest.raises(TextError, match="has 8 positions, not 9"):
        open_text_encoder(str(clip), 9, "all")
    with pytest.raises(ValueError, match="'text' or 'all', got 'some'"):
        open_text_encoder(str(clip), 8, "some")


def test_the_decoder_sees_the_caption_of_each_image(clip, tmp_path):
    task = TokenizerTask(RunConfig.parse(config(tmp_path, clip)), 0, 1)
    source = task._source
    batch = next(iter(evaluation_loader(source, task.config.data)))
    told = task._text.reader(source).condition(batch, torch.zeros(len(batch.indices)))
    expected = [piece.values for piece in open_text_encoder(str(clip), 8, "all").encode(["a zero"])]
    zeros = batch.labels == 0
    torch.testing.assert_close(told.features[zeros], torch.tensor(expected[0]).expand(int(zeros.sum()), -1, -1))
    assert not bool(told.dropped.any())
    assert "text_encoder" in task.frozen()


def test_it_learns_from_the_text(clip, tmp_path):
    run = train(config(tmp_path / "with", clip, freeze=["encoder.*", "latent_tokens"]))
    before = load_tokenizer(run)
    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) == 2
    # The text layer was trained: it gets a gradient only if there are texts.
    without = load_tokenizer(train(config(tmp_path / "without", clip, text=None)))
    assert not torch.equal(before.text.projection.weight, without.text.projection.weight)


def test_sections_that_do_not_fit(clip, tmp_path):
    with pytest.raises(ConfigError, match=r"makes 7 features of 16 channels, but the tokenizer reads 8 of 16"):
        train(config(tmp_path / "a", clip, text={"encoder": str(clip), "length": 7}))
    plain = tokenizer_config(tmp_path / "b", text={"encoder": str(clip), "length": 8})
    with pytest.raises(ConfigError, match="ViTVQGAN reads no text; leave the section out"):
        train(plain)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


@pytest.fixture(scope="module")
def run(clip, tmp_path_factory):
    return train(config(tmp_path_factory.mktemp("runs") / "run", clip))


def scored(run, *overrides):
    names = ("reference", "protocol", "weights", "lpips_weights")
    options = dict.fromkeys(names) | {"batch_size": 7, "device": "cpu", "processes": Processes()}
    result = score_tokenizer(str(run), ["data.limit=20", *overrides], **options)
    assert (result["tokenizer"]["text"] is None) == ("text=null" in overrides)
    return result["scores"]


def held_out(run):
    tokenizer = load_tokenizer(run)
    data = data_of_run(run, ["data.limit=20"], input_shape=tokenizer.input_shape, split="test")
    return tokenizer, data, conditions_of(text_of_run(run, tokenizer), tokenizer, data)


def test_a_run_is_scored_with_the_texts_of_the_images(run):
    tokenizer, data, told = held_out(run)
    batch = next(iter(evaluation_loader(open_source(data), data)))
    made = tokenizer.reconstruct(batch.pixels, condition=told(batch))
    assert not torch.allclose(made, tokenizer.reconstruct(batch.pixels), atol=1e-6)
    for conditions, overrides in ((told, ()), (None, ("text=null",))):
        expected = evaluate_tokenizer(tokenizer, data, conditions=conditions)["scores"]
        assert scored(run, *overrides) == expected
    assert scored(run) != scored(run, "text=null")


def test_distances_and_probes_read_them_too(run, tmp_path):
    tokenizer, data, told = held_out(run)
    network = CallableNetwork(lambda images: images.float().mean((2, 3)), "colours")
    options = {"network": network, "grid": Grid((0.5,), (4,))}
    results = [evaluate_perturbation(tokenizer, data, conditions=given, **options)["scores"] for given in (told, None)]
    plain = evaluate_tokenizer(tokenizer, data, network=network, conditions=told)["scores"]
    assert results[0]["frechet_distance"] == pytest.approx(plain["frechet_distance"])
    assert all(results[0][name] != results[1][name] for name in results[0])
    settings = ProbeSettings(steps=0, train_images=20, test_images=20, network="none")
    psnr = [
        probe(str(run), tmp_path / name, overrides, settings=settings)["reconstruction"]["scores"]["psnr"]
        for name, overrides in (("with", ()), ("without", ("text=null",)))
    ]
    assert psnr[0] != psnr[1]
    again = tmp_path / "again"
    shutil.copytree(run, again)
    compare([str(run), str(again)], tmp_path / "compared", settings=settings)
    texts = read_json(tmp_path / "compared" / "plan.json")["texts"]
    assert texts[0] == texts[1] == json.loads(json.dumps(asdict(text_of_run(run, tokenizer))))


def test_what_says_nothing_of_its_texts_is_not_scored_without_them(run, clip, tmp_path):
    saved = tmp_path / "saved"
    load_tokenizer(run).save_pretrained(saved)
    data = ["data.source=digits", "data.channels=1", "data.image_size=16"]
    with pytest.raises(ValueError, match=r"no run that says what encoded them: name that text encoder with text\.enc"):
        scored(saved, *data)
    assert scored(saved, *data, f"text.encoder={clip}", "text.length=8") == scored(run)
    assert scored(saved, *data, "text=null") == scored(run, "text=null")
    with pytest.raises(ConfigError, match=r"text\.wide"):
        scored(run, "text.wide=1")


def test_image_files_have_no_texts(run, clip, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("L", (16, 16), 90).save(picture)
    arguments = ["reconstruct", str(run), str(picture), "--out", str(tmp_path / "made.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code
    assert "decodes with texts, and image files have none" in str(result.exception)
    untold = train(config(tmp_path / "without", clip, text=None))
    assert CliRunner().invoke(app, ["reconstruct", str(untold), *arguments[2:]]).exit_code == 0


def test_a_tokenizer_without_texts_takes_none(tmp_path):
    plain = train(tokenizer_config(tmp_path / "plain", training=SHORT))
    with pytest.raises(ConfigError, match=r"text\.encoder=x: ViTVQGAN reads no text; leave it out"):
        scored(plain, "text.encoder=x")
