"""MingTok: both ways of expanding latents, image sizes, masked training, standardisation, foreign keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import pixels, tiny

from vistok.draws import Keys

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_expanding_in_any_steps_equals_expanding_at_once(counts):
    model = tiny("mingtok")
    tokens = Keys.range(0, 2).normal("tokens", sum(counts), 4)
    expander = model.expander()
    parts = [expander.step(part) for part in tokens.split(counts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.semantic_features(tokens), **CLOSE)


@torch.no_grad()
def test_features_do_not_depend_on_later_tokens():
    model, tokens = tiny("mingtok"), Keys.range(0, 2).normal("tokens", 16, 4)
    changed = tokens.clone()
    changed[:, 9:] += 1
    before, after = model.semantic_features(tokens), model.semantic_features(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], **CLOSE)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (6, 3), (5, 5)])
def test_other_image_sizes_encode_and_decode(grid):
    model = tiny("mingtok")
    images = Keys.range(0, 2).uniform("images", 3, 4 * grid[0], 4 * grid[1]) * 2 - 1
    assert model.spec_for(images.shape[1:]).grid == grid
    output = model(images)
    assert output.tokens.shape == (2, grid[0] * grid[1], 4)
    torch.testing.assert_close(model.decode(model.encode(images), grid=grid), output.reconstruction, **CLOSE)
    if grid[0] == grid[1]:
        torch.testing.assert_close(model.decode(output.tokens), output.reconstruction, **CLOSE)


def test_a_grid_that_does_not_hold_the_tokens_is_refused():
    model = tiny("mingtok")
    with pytest.raises(ValueError, match=r"grid of 4x4 does not hold 18 tokens; say which does with grid="):
        model.decode(torch.zeros(1, 18, 4))
    with pytest.raises(ValueError, match="made by another tokenizer"):
        model.decode(torch.zeros(1, 16, 5))
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\), got 1"):
        tiny("mingtok", mask_ratio=1.0)
    with pytest.raises(ValueError, match="latent_dim 5 must divide"):
        tiny("mingtok", latent_dim=5)


def test_masked_training_hides_patches_and_counts_where_it_should():
    model = tiny("mingtok", mask_ratio=0.25)
    images, draws = pixels(model), model.training_draws(Keys.range(0, 3))
    output = model(images, draws=draws)
    hidden = output.weight_maps["latents"].bool()
    assert hidden.sum(1).tolist() == [4, 4, 4]
    # The pixels of masked patches have no influence.
    noise = (1 - output.weight_maps["masked"]) * 0.5
    again = model(images + noise, draws=draws)
    torch.testing.assert_close(again.features["semantic"], output.features["semantic"], **CLOSE)
    assert not torch.allclose(again.reconstruction, output.reconstruction, atol=1e-3)
    output.reconstructions["masked"].sum().backward()
    assert model.encoder.mask_token.grad.abs().sum() > 0
    assert list(model(images).reconstructions) == ["main"]


@torch.no_grad()
def test_standardised_latents_have_mean_0_and_deviation_1_and_mean_the_same_pixels(tmp_path):
    model = tiny("mingtok")
    images = pixels(model)
    before = model.decode(model.encode(images))
    model.standardise(images)
    tokens = model.encode(images)
    assert tokens.mean().item() == pytest.approx(0, abs=1e-4)
    assert tokens.std().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(model.decode(tokens), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "model").encode(images), tokens)
