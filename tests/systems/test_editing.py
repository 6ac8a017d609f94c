"""Editing images: masks in pixels and tokens, and the part of an image that is generated anew."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from support.tiny_models import tiny

from vistok.data.masks import pixel_masks, token_masks
from vistok.draws import Keys
from vistok.pipelines import Pipeline

QUICK = {"num_iter": 3, "num_steps": 5, "step_spacing": "stride"}


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny("kl_vae"), tiny("mar"), class_names=("cat", "dog", "crane", "tench", "fox"), sampling=QUICK)


@pytest.fixture
def pixels() -> torch.Tensor:
    return Keys.range(0, 3).normal("pixels", 3, 16, 16).clamp(-1, 1)


def upper_left(count: int | None = None) -> torch.Tensor:
    """Touches the first token of a 4x4 grid over 16x16 pixels, and half of the one below."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:6, :4] = True
    return mask if count is None else mask.repeat(count, 1, 1)


def test_tokens_outside_the_mask_are_kept(pipe, pixels):
    tokens = pipe.tokenizer.encode(pixels).detach()
    edited = pipe.edit(pixels, upper_left(), ["cat", "dog", 4], seed=3)
    changed = torch.zeros(16, dtype=torch.bool)
    changed[[0, 4]] = True
    assert torch.equal(edited.tokens[:, ~changed], tokens[:, ~changed])
    assert (edited.tokens - tokens)[:, changed].abs().min() > 1e-4
    assert edited.labels == [0, 1, 4]
    assert edited.pixels.shape == pixels.shape
    assert len(edited.images) == 3


def test_class_seed_and_batch(pipe, pixels):
    masks = torch.stack([upper_left(), upper_left().mT, torch.ones(16, 16, dtype=torch.bool)])  # 2, 2 and 16 tokens
    whole = pipe.edit(pixels, masks, "fox", seed=1)
    assert whole.labels == [4, 4, 4]
    parts = pipe.edit(pixels, masks, "fox", seed=1, batch_size=2)
    torch.testing.assert_close(parts.tokens, whole.tokens, atol=1e-4, rtol=1e-4)
    for changed in ({"seed": 2}, {"class_labels": "cat"}, {"class_labels": None}):
        other = pipe.edit(pixels, masks, **{"class_labels": "fox", "seed": 1} | changed)
        assert not torch.allclose(other.tokens, whole.tokens)


def test_photos_and_drawn_masks(pipe):
    photo, mask = Image.new("RGB", (48, 32), "red"), Image.new("L", (48, 32))
    mask.paste(255, (8, 0, 16, 8))  # the first 4x4 pixels after the crop to 16x16
    edited = pipe.edit(photo, mask, "cat")
    kept = pipe.tokenizer.encode(torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    same = torch.isclose(edited.tokens, kept, atol=1e-5).all(-1)[0]
    assert same.tolist() == [False] + [True] * 15


def test_patches_of_the_model_are_generated_whole(pixels):
    pipe = Pipeline(tiny("kl_vae"), tiny("mar", patch_size=2), sampling=QUICK)
    same = (pipe.edit(pixels, upper_left(), 0).tokens == pipe.tokenizer.encode(pixels)).all(-1)
    assert same.tolist() == [[i not in (0, 1, 4, 5) for i in range(16)]] * 3


def test_masks_in_tokens():
    masks = torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[0, 3, 3] = masks[1, 4, 11] = True
    assert token_masks(masks, (2, 3)).tolist() == [[True, *[False] * 5], [*[False] * 5, True]]
    with pytest.raises(ValueError, match="2x5 tokens does not divide masks of 8x12"):
        token_masks(masks, (2, 5))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(8, 8, dtype=torch.bool), r"must have shape \(16, 16\) or \(3, 16, 16\).*got \(1, 8, 8\)"),
        (torch.zeros(2, 16, 16, dtype=torch.bool), r"for 3 images of 16x16, got \(2, 16, 16\)"),
        (torch.zeros(16, dtype=torch.bool), r"got \(16,\)"),
        (torch.zeros(16, 16), "must be bool"),
        ([Image.new("L", (16, 16))] * 2, r"got \(2, 16, 16\)"),
    ],
)
def test_bad_masks(masks, message):
    with pytest.raises(ValueError, match=message):
        pixel_masks(masks, 3, (16, 16))


def test_what_cannot_be_edited(pipe, pixels):
    with pytest.raises(ValueError, match="one for each of the 3 images; got 2"):
        pipe.edit(pixels, upper_left(), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"XAR generates in an order of its own.*fills in any positions"):
        Pipeline(tiny("kl_vae"), tiny("xar")).edit(pixels, upper_left(), 0)
    flextok = tiny("flextok")
    with pytest.raises(ValueError, match="no place in the image"):
        Pipeline(flextok, tiny("llama", spec=flextok.spec, positions="rope1d")).edit(pixels, upper_left(), 0)
