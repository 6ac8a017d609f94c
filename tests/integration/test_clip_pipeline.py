"""Clips from end to end: tokens of moving digits, a generator of clips, frame prediction, samples, reconstructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import tiny
from torch import Tensor

from vistok.data import DataConfig, TokenBatches
from vistok.data.clips import repeat_last
from vistok.data.movies import Movie, save_mp4
from vistok.pipelines import Pipeline
from vistok.pipelines.samples import reconstruct_files, write_samples
from vistok.train.tokenize import tokenize

pytest.importorskip("av")

DATA = DataConfig(16, source="moving_digits", num_frames=4, channels=3, batch_size=4, limit=10)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("larp", image_size=16)


@pytest.fixture(scope="module")
def predictor(tokenizer) -> Pipeline:
    length = tokenizer.num_tokens
    generator = tiny(
        "llama", spec=tokenizer.spec, condition_tokens=length, positions="learned", num_positions=2 * length
    )
    return Pipeline(tokenizer, generator)


@pytest.fixture(scope="module")
def classes(tokenizer) -> Pipeline:
    return Pipeline(tokenizer, tiny("llama", spec=tokenizer.spec, num_classes=10, positions="learned"))


@pytest.mark.parametrize(("augmentation", "views"), [("none", 1), ("flip", 2), ("random:3", 3)])
def test_clips_become_tokens_with_the_frames_given_before_each_view(tokenizer, tmp_path, augmentation, views):
    cache = tokenize(tokenizer, DATA, tmp_path / "cache", augmentation=augmentation, given_frames=2)
    assert (len(cache), cache.views) == (10, views)
    assert cache.condition_spec.parts == ("labels", "given")
    batch, _ = TokenBatches(cache, seed=0).load(np.arange(10), 0)
    assert batch.tokens.shape == batch.condition.given.shape == (10, tokenizer.num_tokens)


def test_given_tokens_are_those_of_the_first_frames(tokenizer, tmp_path):
    from vistok.data.loader import batch_reader
    from vistok.data.opening import open_source

    cache = tokenize(tokenizer, DATA, tmp_path / "cache", given_frames=3)
    clips = batch_reader(open_source(DATA), DATA, augmented=False).load(np.arange(10), 0)[0].pixels
    batch, _ = TokenBatches(cache, seed=0).load(np.arange(10), 0)
    assert torch.equal(batch.tokens, tokenizer.encode(clips))
    assert torch.equal(batch.condition.given, tokenizer.encode(repeat_last(clips[:, :, :3], 4)))


def test_what_cannot_be_given_is_refused(tokenizer, tmp_path):
    for count in (4, -1):
        with pytest.raises(ValueError, match=rf"given_frames must lie in 1\.\.3 for clips of 4 frames, got {count}"):
            tokenize(tokenizer, DATA, tmp_path / "cache", given_frames=count)
    with pytest.raises(ValueError, match="frames are given to tokenizers of clips"):
        tokenize(tiny("vit_vqgan"), DATA, tmp_path / "cache", given_frames=1)
    with pytest.raises(ValueError, match="ten_crop cuts images"):
        tokenize(tokenizer, DATA, tmp_path / "cache", augmentation="ten_crop")


def test_frames_are_predicted_from_given_ones_in_every_form(predictor):
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    made = predictor(frames=frames, seed=3)
    assert made.videos.shape == (1, 4, 16, 16, 3)
    assert made.videos.dtype == np.uint8
    assert isinstance(made.movies[0], Movie)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    for same in (pixels, frames[None], torch.from_numpy(frames)):
        assert torch.equal(predictor(frames=same, seed=3).tokens, made.tokens)
    assert not torch.equal(predictor(frames=255 - frames, seed=3).tokens, made.tokens)
    assert len(predictor(frames=np.stack([frames, frames]), seed=3).images) == 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((5, 16, 16, 3), np.uint8), "5 frames cannot begin a clip of 4"),
        (np.zeros((2, 3, 16, 16), np.uint8), "with 1 or 3 channels"),
        (np.zeros((2, 16, 16, 3)), "frames must be uint8"),
        (np.zeros((2, 16, 16, 4), np.uint8), "with 1 or 3 channels"),
        (np.zeros((0, 16, 16, 3), np.uint8), r"got uint8 \(1, 0, 16, 16, 3\)"),
        ([], "got an empty one"),
        ([np.zeros((16, 16, 3), np.uint8)], "got ndarray in it; stack"),
        ([Image.new("RGB", (16, 16)), Image.new("RGB", (16, 18))], "of one size"),
        (torch.zeros(3, 2, 16, 16), "float frames must be clips"),
        (torch.zeros(1, 3, 0, 16, 16), "0 frames cannot begin a clip of 4"),
    ],
)
def test_wrong_frames_are_named(predictor, frames, message):
    with pytest.raises(ValueError, match=message):
        predictor(frames=frames)


def test_pipelines_of_images_have_no_videos(classes):
    pipe = Pipeline(tiny("vit_vqgan"), tiny("llama"))
    with pytest.raises(ValueError, match="reads images"):
        pipe(frames=np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="which have no frames"):
        pipe(class_labels=[0]).videos  # noqa: B018
    with pytest.raises(ValueError, match="takes class labels"):
        classes(frames=np.zeros((2, 16, 16, 3), np.uint8))


def test_samples_of_clips_are_movies_and_pictures(classes, tmp_path):
    with pytest.raises(ValueError, match=r"the list of class_labels is empty"):
        write_samples(classes, tmp_path / "none", 2, classes=[])
    write_samples(classes, tmp_path / "samples", 2, seed=1)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == sorted(f"00000{i}.{end}" for i in (0, 1) for end in ("png", "mp4", "gif")) + [
        "grid.png",
        "samples.json",
    ]
    with pytest.raises(ValueError, match=r"samples\.npz holds images"):
        write_samples(classes, tmp_path / "others", 2, npz=True)


def test_a_video_is_reconstructed_side_by_side(tokenizer, tmp_path):
    frames: Tensor = torch.randint(0, 256, (9, 20, 30, 3), dtype=torch.uint8)
    save_mp4(frames.numpy(), tmp_path / "clip.mp4")
    decibels = reconstruct_files(tokenizer, [tmp_path / "clip.mp4"] * 2, tmp_path / "out.png")
    assert len(decibels) == 2
    assert (tmp_path / "out.png").exists()
    assert (tmp_path / "out.mp4").exists()


def test_a_stream_of_clips_ends_with_the_clips(classes):
    *_, last = classes.stream([1], seed=2)
    assert torch.equal(last.tokens, classes([1], seed=2).tokens)
    assert last.images[0].size == classes([1], seed=2).images[0].size


def test_clips_are_the_same_in_any_batch(classes):
    together = classes([1, 2, 3], seed=5).pixels
    alone = torch.cat([classes([label], seed=5, index_start=i).pixels for i, label in enumerate((1, 2, 3))])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_generated_clips_play_in_a_notebook(classes):
    shown = classes([1, 2], seed=0)._repr_html_()
    assert shown.count("<video controls loop autoplay") == shown.count("data:video/mp4;base64,") == 2
