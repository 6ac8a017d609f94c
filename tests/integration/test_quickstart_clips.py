"""The quickstart of clips with a few training steps, what its scores count, and its report."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import fields

import pytest
import torch
from PIL import Image

import vistok
from vistok.data.config import DataConfig
from vistok.data.tokens import TokenCache
from vistok.quickstart import Recipe, quickstart
from vistok.quickstart.clip_scores import (
    Clips,
    ClipScores,
    centres,
    fit_frame_classifier,
    load_clips,
    mean_displacement,
    prediction_psnr,
    repeat_given,
    score_clips,
)
from vistok.quickstart.clips import spread
from vistok.quickstart.scores import encode

pytestmark = pytest.mark.slow

pytest.importorskip("av")

FEW = ("training.max_steps=2", "training.log_every=1", "training.image_every=0")
SHORT = Recipe(
    system="larp",
    tokenizer=(*FEW, "data.limit=64"),
    generator=(*FEW, "model.num_layers=1"),
    predictor=(*FEW, "model.num_layers=1"),
    views=2,
    classifier_steps=2,
    samples_per_class=10,
)
DATA = DataConfig(16, source="moving_digits", num_frames=16, channels=1, limit=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clips") / "quickstart"
    quickstart(out, SHORT)
    return out


@pytest.fixture(scope="module")
def real() -> Clips:
    return load_clips(DATA)


def test_everything_is_there_and_is_ordinary(folder):
    result = json.loads((folder / "result.json").read_text())
    assert list(result) == [*(field.name for field in fields(ClipScores)), "seconds", "protocol"]
    protocol = result["protocol"]
    counts = [protocol[f"{what}_clips"] for what in ("training", "held_out", "generated", "predicted")]
    assert counts == [64, 64, 20, 64]
    classes, frames = (vistok.pipeline(folder / name, device="cpu") for name in ("generator", "predictor"))
    made = classes([3], seed=1)
    assert made.videos.shape == (1, *classes.tokenizer.input_shape[1:], 1)
    assert frames(frames=made.videos[:, :5]).videos.shape == made.videos.shape
    cache = TokenCache(folder / "tokens")
    assert (cache.views, cache.condition_spec.parts) == (2, ("labels", "given"))


def test_report_has_clips_that_play(folder):
    text = (folder / "report.html").read_text()
    assert "http" not in text
    assert "<script" not in text
    movies = [base64.b64decode(data) for data in re.findall(r"data:image/gif;base64,([^\"]+)", text)]
    lengths = []
    for movie in movies:
        with Image.open(io.BytesIO(movie)) as gif:
            lengths.append(gif.n_frames)
    assert lengths == [lengths[0], 16, 16, 16]  # a generator of two steps makes still clips, which need one frame
    for name in ("samples", "predictions", "nearest", "reconstructions"):
        assert {(folder / f"{name}.{extension}").is_file() for extension in ("mp4", "gif")} == {True}
    assert "repeated" in text


def test_real_clips_score_as_real_clips(folder, real):
    """Held-out clips in place of generated ones get the scores of held-out clips; training clips are copies."""
    tokenizer, cache = vistok.load(folder / "tokenizer" / "tokenizer"), TokenCache(folder / "tokens")
    classifier = fit_frame_classifier(spread(real, 20), steps=150)
    few = spread(real, 20)
    new = torch.full((20, tokenizer.spec.length), tokenizer.spec.codebook_size) + torch.arange(20)[:, None]
    settings = {"given": 5, "classifier": classifier, "tokenizer": tokenizer, "cache": cache}
    scores = score_clips(few, new, (few.pixels, few.pixels), train=real, test=few, **settings)
    assert scores.recognised == scores.recognised_real > 0.9
    assert scores.displacement == scores.displacement_real > 0.3
    assert (scores.distinct, scores.copies) == (1, 0)
    assert scores.prediction > scores.prediction_black > scores.prediction_repeat > 5
    scores = score_clips(few, encode(tokenizer, few.pixels), (few.pixels, few.pixels), train=real, test=few, **settings)
    assert scores.copies == 1
    noise = Clips(torch.rand_like(few.pixels) * 2 - 1, few.labels)
    scores = score_clips(noise, new, (few.pixels, few.pixels), train=real, test=few, **settings)
    assert scores.recognised < 0.5


def test_centres_of_mass_follow_the_digit():
    clips = torch.full((1, 1, 3, 16, 16), -1.0)
    for frame, (top, left) in enumerate([(2, 3), (2, 7), (5, 11)]):
        clips[0, 0, frame, top : top + 2, left : left + 2] = 1
    assert centres(clips).tolist() == [[[2.5, 3.5], [2.5, 7.5], [5.5, 11.5]]]
    assert mean_displacement(clips) == pytest.approx((4 + 5) / 2)
    hazy = clips.clone()
    hazy[clips < 0] = -0.6
    assert torch.allclose(centres(hazy), centres(clips), atol=1e-4)


def test_repeated_frames_are_the_last_that_was_given(real):
    repeated = repeat_given(real.pixels, 5)
    assert torch.equal(repeated[:, :, :5], real.pixels[:, :, :5])
    assert torch.equal(repeated[:, :, 15], real.pixels[:, :, 4])
    changed = real.pixels.clone()
    changed[:, :, :5] = 0  # given frames are not scored
    assert prediction_psnr(real.pixels, changed, 5) == float("inf")
