"""Editing images: masks in pixels and tokens, and the part of an image that is generated anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.grid import decoding_refusal
from support.tiny_models import in_loop, labels, names, tiny, token_ids
from support.tiny_text import save_tiny_t5

from vistok.data.masks import pixel_masks, token_masks
from vistok.draws import Keys
from vistok.generators.engine.decodings import DECODINGS
from vistok.pipelines import Pipeline
from vistok.text import PromptEncoder, open_text_encoder, open_text_tokenizer

DISCRETE = [name for name in names("generator") if tiny(name).spec.discrete]
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


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("name", DISCRETE)
def test_every_generator_of_ids_keeps_known_tokens_with_every_decoding_or_says_why_not(name, decoding):
    model, refusal = tiny(name), decoding_refusal(tiny(name), decoding)
    tokens = token_ids(model)
    regenerate = Keys.range(3, 3).uniform("regenerate", model.spec.length) < 0.5

    def edit(where: torch.Tensor) -> torch.Tensor:
        options = model.options_type(**({} if decoding == "plain" else {"decoding": decoding}))
        draws = model.sampling_draws(Keys.range(0, 3), options)
        return model.edit(tokens, where, labels(0, 1, 2), options, draws=draws, **in_loop(model))

    if refusal is not None:
        with pytest.raises((ValueError, TypeError), match=refusal):
            edit(regenerate)
        return
    made = edit(regenerate)
    assert torch.equal(made[~regenerate], tokens[~regenerate])
    assert not torch.equal(made, tokens)
    assert torch.equal(edit(regenerate[0])[:1], made[:1])  # one mask for all


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), [("llama", {}), ("token_shuffle", {"window": 1})])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "top_k": 5}])
def test_a_raster_is_drawn_with_a_look_at_what_is_above_and_to_the_left_alone(name, arguments, options):
    model = tiny(name, **arguments)
    options, tokens = model.options_type(**options), token_ids(model)
    draws = model.sampling_draws(Keys.range(0, 3), options)
    regenerate = torch.zeros(16, dtype=torch.bool)
    regenerate[6] = True
    made = model.edit(tokens, regenerate, labels(0, 1, 2), options, draws=draws)
    session = model.start(labels(0, 1, 2), options, draws=draws)
    session.append(tokens[:, :6])
    next(session.generate(1))
    assert torch.equal(made[:, :7], session.tokens)
    later, before = tokens.clone(), tokens.clone()
    later[:, 7:], before[:, 0] = (later[:, 7:] + 1) % 32, (before[:, 0] + 1) % 32
    assert torch.equal(model.edit(later, regenerate, labels(0, 1, 2), options, draws=draws)[:, 6], made[:, 6])
    greedy = replace(options, temperature=0.0)
    first, second = (model.edit(t, regenerate, labels(0, 1, 2), greedy) for t in (tokens, before))
    assert not torch.equal(first[:, 6], second[:, 6])


@torch.no_grad()
def test_of_a_window_that_is_partly_known_the_rest_is_drawn_as_in_a_new_image():
    model, condition = tiny("token_shuffle"), labels(0, 1, 2)
    tokens, options = token_ids(model), model.options_type()
    draws = model.sampling_draws(Keys.range(0, 3), options)
    whole, partly = torch.zeros(2, 16, dtype=torch.bool).unbind()
    whole[[2, 3, 6, 7]] = partly[[3, 6]] = True  # a part of the second window
    free, made = (model.edit(tokens, where, condition, options, draws=draws) for where in (whole, partly))
    assert torch.equal(made[:, partly], free[:, partly])
    assert torch.equal(made[:, ~partly], tokens[:, ~partly])
    # Later windows see the known tokens of a window.
    last = partly.clone()
    last[[10, 11, 14, 15]] = True
    greedy = replace(options, temperature=0.0)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 32
    first, second = (model.edit(t, last, condition, greedy) for t in (tokens, changed))
    assert torch.equal(first[:, partly], second[:, partly])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("generator", "tokenizer"), [("llama", "llamagen_vq"), ("token_shuffle", "llamagen_vq")])
def test_images_of_raster_generators_are_edited_by_class(generator, tokenizer, pixels):
    codec = tiny(tokenizer)
    pipe = Pipeline(codec, tiny(generator, spec=codec.spec), sampling={"guidance_scale": 2.0})
    masks = torch.stack([upper_left(), upper_left().mT, torch.ones(16, 16, dtype=torch.bool)])
    made = pipe.edit(pixels, masks, [0, 3, 4], seed=2)
    kept = ~token_masks(masks, codec.spec.grid)
    assert torch.equal(made.tokens[kept], codec.encode(pixels)[kept])
    assert torch.equal(made.tokens[2], pipe([4], seed=2, index_start=2).tokens[0])  # the last has no known token
    alone = pipe.edit(pixels[1:2], masks[1:2], 3, seed=2, index_start=1)
    assert torch.equal(alone.tokens[0], made.tokens[1])


def test_prompts_say_what_goes_into_the_mask(pixels, tmp_path):
    pytest.importorskip("transformers")
    codec = tiny("llamagen_vq")
    text = PromptEncoder([open_text_encoder(str(save_tiny_t5(tmp_path / "t5")), 6)])
    spoken = tiny("llama", spec=codec.spec, num_classes=0, caption_dim=16, caption_length=6)
    written = tiny("token_shuffle", spec=codec.spec, num_classes=0, text_vocabulary=256, text_length=6)
    for generator, encoder in ((spoken, text), (written, PromptEncoder([open_text_tokenizer("bytes", 6)]))):
        pipe = Pipeline(codec, generator, sampling={"guidance_scale": 3.0}, text=encoder)
        made = pipe.edit(pixels, upper_left(), prompt="a red cat", negative_prompt="a bird", seed=1)
        kept = ~token_masks(upper_left(1), codec.spec.grid).expand(3, -1)
        assert torch.equal(made.tokens[kept], codec.encode(pixels)[kept])
        assert made.prompts == ["a red cat"] * 3
        greedy = {"temperature": 0.0, "seed": 1}
        red, blue = (pipe.edit(pixels, ~upper_left(), prompt=p, **greedy).tokens for p in ("a red cat", "blue"))
        assert not torch.equal(red, blue)
        with pytest.raises(ValueError, match="no classes"):
            pipe.edit(pixels, upper_left(), 1)


@pytest.mark.parametrize(
    ("tokens", "regenerate", "message"),
    [
        (torch.zeros(2, 16).long(), torch.ones(3, 16).bool(), r"\(16,\) or \(B, 16\), got \(2, 16\) and \(3, 16\)"),
        (torch.zeros(2, 12).long(), torch.ones(12).bool(), r"got \(2, 12\) and \(12,\)"),
        (torch.zeros(2, 16).long(), torch.ones(16), "regenerate must be bool.*float32"),
        (torch.full((2, 16), 99), torch.ones(16).bool(), "token id 99 is out of range"),
        (torch.zeros(2, 16), torch.ones(16).bool(), "must be integers, got torch.float32"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "token_shuffle", "maskgit", "randar"])
def test_tokens_and_positions_that_do_not_fit(name, tokens, regenerate, message):
    model = tiny(name)
    with pytest.raises(ValueError, match=message):
        model.edit(tokens, regenerate, labels(0, 1), draws=model.sampling_draws(Keys.range(0, 2)))


def test_what_cannot_be_edited(pipe, pixels):
    with pytest.raises(ValueError, match="one for each of the 3 images; got 2"):
        pipe.edit(pixels, upper_left(), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"XAR cannot keep some tokens.*fills in any positions"):
        Pipeline(tiny("kl_vae"), tiny("xar")).edit(pixels, upper_left(), 0)
    flextok = tiny("flextok")
    with pytest.raises(ValueError, match="no place in the image"):
        Pipeline(flextok, tiny("llama", spec=flextok.spec, positions="rope1d")).edit(pixels, upper_left(), 0)
