"""Image tokenizers on clips, frame by frame."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import ARGUMENTS, names, pixels, tiny

import vistok
from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.tokenizers.framewise import Framewise
from vistok.types import Clock

IMAGES = [
    name
    for name in names("tokenizer")
    if "num_frames" not in registry.entry(name).load().data_arguments.values() and not tiny(name).spec.scales
]


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_tokenizer_reads_clips_frame_by_frame(name):
    image = tiny(name)
    model = Framewise.of(image, 3)
    clips = pixels(model, batch=2)
    tokens = model.encode(clips)
    length = image.spec.length
    assert tokens.shape[:2] == (2, 3 * length)
    torch.testing.assert_close(tokens[1, length : 2 * length], image.encode(clips[1:, :, 1])[0], rtol=1e-4, atol=1e-4)
    assert model.renders == image.renders
    if image.renders:
        draws = model.decoding_draws(Keys.range(0, 2))
        assert model.decode(tokens, **({"draws": draws} if draws else {})).shape == clips.shape
    output = model.train()(clips, clock=Clock(0, 10), draws=model.training_draws(Keys.range(0, 2)))
    assert output.tokens.shape == tokens.shape
    if output.reconstruction is not None:
        assert output.reconstruction.shape == clips.shape
    terms = [term.mean() for term in output.losses.values()]
    assert all(term.isfinite() for term in terms)


def test_a_clip_of_frames_saves_and_loads(tmp_path):
    model = Framewise.of(tiny("vit_vqgan"), 2)
    assert model.spec.grid == (2, 4, 4)
    model.save_pretrained(tmp_path / "model")
    loaded = vistok.load(tmp_path / "model")
    assert torch.equal(loaded.encode(pixels(model)), model.encode(pixels(model)))
    assert loaded.config == {"num_frames": 2, "tokenizer": {"name": "vit_vqgan", **tiny("vit_vqgan").config}}


@pytest.mark.parametrize(("name", "arguments"), [("kl_vae", {}), ("titok", {"bottleneck": "vae"})])
def test_moments_of_frames_are_those_of_their_images(name, arguments):
    image = tiny(name, **arguments)
    model = Framewise.of(image, 3)
    clips = pixels(model, batch=2)
    model.standardise(clips)
    length = image.spec.length
    assert model.has_posterior
    torch.testing.assert_close(
        model.encode_moments(clips)[1, length : 2 * length],
        image.encode_moments(clips[1:, :, 1])[0],
        rtol=1e-4,
        atol=1e-4,
    )
    assert not any(key.startswith("gaussian") for key in model.state_dict())


@pytest.mark.parametrize(("name", "arguments"), [("kl_vae", {}), ("mingtok", {}), ("titok", {"bottleneck": "vae"})])
def test_standardised_latents_of_frames_stay_so_when_saved(name, arguments, tmp_path):
    Framewise.of(tiny(name, **arguments), 2).save_pretrained(tmp_path / "raw")
    model = vistok.load(tmp_path / "raw")
    clips, before = pixels(model), model.fingerprint()
    raw = model.encode(clips)
    model.standardise(clips)
    model.save_pretrained(tmp_path / "model")
    loaded = vistok.load(tmp_path / "model")
    assert torch.equal(loaded.encode(clips), model.encode(clips))
    assert not torch.allclose(loaded.encode(clips), raw)
    assert loaded.fingerprint() == model.fingerprint() != before


def test_what_is_no_image_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs the name of an image tokenizer"):
        Framewise(2, {})
    with pytest.raises(ValueError, match="framewise works on images, but LARP reads clips"):
        Framewise(2, {"name": "larp", **ARGUMENTS["larp"]})
    model = Framewise.of(tiny("vit_vqgan"), 2)
    with pytest.raises(ValueError, match="2 frames have 32 tokens, 16 each, got 16"):
        model.decode(torch.zeros(1, 16, dtype=torch.int64))
