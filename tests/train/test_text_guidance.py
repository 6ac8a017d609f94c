"""Tokenizers whose decoder reads the captions of their images, in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_runs import tokenizer_config
from support.tiny_text import save_tiny_clip, save_tiny_t5

from vistok.config import ConfigError
from vistok.data.loader import evaluation_loader
from vistok.pipelines.folders import load_tokenizer
from vistok.text import TextError, open_text_encoder
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks.tokenizer import TokenizerTask

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
    # The text's layer was trained: it gets a gradient only where texts come in.
    without = load_tokenizer(train(config(tmp_path / "without", clip, text=None)))
    assert not torch.equal(before.text.projection.weight, without.text.projection.weight)


def test_sections_that_do_not_fit(clip, tmp_path):
    with pytest.raises(ConfigError, match=r"makes 7 features of 16 channels, but the tokenizer reads 8 of 16"):
        train(config(tmp_path / "a", clip, text={"encoder": str(clip), "length": 7}))
    plain = tokenizer_config(tmp_path / "b", text={"encoder": str(clip), "length": 8})
    with pytest.raises(ConfigError, match="ViTVQGAN reads no text; leave the section out"):
        train(plain)
