"""Ids drawn in parts: Open-MAGVIT2's generator, and what the engine does for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import labels, pixels, tiny, token_ids

from vistok.checkpoints import CheckpointError, with_averages
from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.generators.open_magvit2_gpt.sampling import SubTokenOptions
from vistok.generators.open_magvit2_gpt.sub_tokens import SubTokens
from vistok.types import TokenSpec

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
THREE = {"factorized_bits": (2, 1, 2)}


def gpt(**arguments):
    return tiny("open_magvit2_gpt", **arguments)


@settings(max_examples=25, deadline=None)
@given(bits=st.lists(st.integers(1, 12), min_size=2, max_size=4), seed=st.integers(0, 100))
def test_parts_of_ids_make_the_ids(bits, seed):
    split = SubTokens(tuple(bits))
    ids = torch.randint(2 ** sum(bits), (3, 5), generator=torch.Generator().manual_seed(seed))
    parts = split.split(ids)
    assert all(int(part.min()) >= 0 and int(part.max()) < size for part, size in zip(parts, split.sizes))
    assert torch.equal(parts[0] + 2 ** bits[0] * (ids >> bits[0]), ids)
    assert torch.equal(split.join(parts), ids)


def steps(model, condition, options, draws=None):
    """Guided logits of each part as the session computes them, and the ids."""
    session, found = model.start(condition, options, draws=draws), []
    for _ in range(model.spec.length):
        parts, seen = [], []
        for part in range(model.num_parts):
            seen.append(session.next_logits(parts))
            uniforms = None if draws is None else draws["ids" if part == 0 else f"ids_{part}"][:, session.step, None]
            parts.append(draw_ids(seen[-1], uniforms, options.of_part(part)))
        found.append(seen)
        session.commit(parts)
    return [torch.cat(column, 1) for column in zip(*found)], session.tokens


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, THREE], ids=["two", "three"])
@pytest.mark.parametrize("later", [None, 1.0, 3.5])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_cached_logits_equal_teacher_forced_ones(scale, later, arguments):
    model, condition = gpt(**arguments), labels(0, 4, 2)
    options = SubTokenOptions(guidance_scale=scale, later_guidance_scale=later, later_temperature=0.7, later_top_k=3)
    draws = model.sampling_draws(Keys.range(0, 3), options)
    logits, ids = steps(model, condition, options, draws)
    assert torch.equal(model.sample(condition, options, draws=draws), ids)
    conditional, null = (model.part_predictions(ids, rows) for rows in (condition, condition.null()))
    for part, (found, one, other) in enumerate(zip(logits, conditional, null)):
        s = scale if part == 0 or later is None else later
        torch.testing.assert_close(found, other + s * (one - other), **TOLERANCE)


@torch.no_grad()
def test_the_second_part_depends_on_the_first():
    model, ids = gpt(), torch.zeros(1, 16, dtype=torch.int64)
    first, second = model.part_predictions(ids, labels(1))
    changed = ids.clone()
    changed[:, 5] = 1  # its lowest bit
    others = model.part_predictions(changed, labels(1))
    assert torch.equal(first[:, :6], others[0][:, :6])
    assert not torch.equal(first[:, 6], others[0][:, 6])
    assert torch.equal(second[:, :5], others[1][:, :5])
    assert not torch.equal(second[:, 5], others[1][:, 5])


@torch.no_grad()
def test_one_seed_gives_one_sample_in_any_batch():
    model, options = gpt(), SubTokenOptions(guidance_scale=2.0, later_temperature=1.3)
    draws = model.sampling_draws(Keys.range(0, 4), options)
    whole = model.sample(labels(0, 1, 2, 3), options, draws=draws)
    alone = model.sample(labels(2), options, draws=model.sampling_draws(Keys.of(0, [2]), options))
    assert torch.equal(whole[2:3], alone)


@torch.no_grad()
def test_prefixes_and_forced_ids_are_kept():
    model, condition, ids = gpt(), labels(0, 4, 2), token_ids(gpt())
    session = model.start(condition, DecodingOptions(temperature=0))
    session.append(ids[:, :7])
    list(session.generate())
    assert torch.equal(session.tokens[:, :7], ids[:, :7])
    where = torch.arange(16).expand(3, -1) % 3 == 0
    session = model.start(condition, DecodingOptions(temperature=0))
    session.force(ids, where)
    list(session.generate())
    assert torch.equal(session.tokens[where], ids[where])


def test_the_loss_is_the_sum_of_the_parts():
    model, ids, condition = gpt(), token_ids(gpt()), labels(0, 1, 2)
    output = model(ids, condition)
    losses = [
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), part)
        for logits, part in zip(model.part_predictions(ids, condition), model.split_ids(ids))
    ]
    torch.testing.assert_close(output.loss, sum(losses))
    weighted = model(ids, condition, weights=torch.tensor([1.0, 0.0, 0.0])).loss
    torch.testing.assert_close(weighted, model(ids[:1], condition[:1]).loss)


def test_bits_must_add_up():
    with pytest.raises(ValueError, match=r"\(2, 4\) add up to 6 bits, which are 64 codes, but this tokenizer has 32"):
        gpt(factorized_bits=(2, 4))
    for bits in ((5,), (0, 5), (-1, 6), (2.5, 2.5), 5, None):
        with pytest.raises(ValueError, match="two or more whole numbers of at least 1, got"):
            gpt(factorized_bits=bits)
    with pytest.raises(ValueError, match="add up to 1000002, and an id holds 62 bits at most"):
        gpt(factorized_bits=(2, 10**6))
    with pytest.raises(ValueError, match="32 codes, but this tokenizer has 30"):
        gpt(spec=TokenSpec(16, 30, dim=5, grid=(4, 4)), factorized_bits=(2, 3))
    with pytest.raises(ValueError, match="continuous"):
        gpt(spec=TokenSpec(16, None, dim=5, grid=(4, 4)))


def test_what_cannot_draw_in_parts_says_so():
    model = gpt()
    with pytest.raises(ValueError, match="no compiled decoding"):
        model.compile_decoding()
    with pytest.raises(ValueError, match="'jacobi' guesses whole ids"):
        model.start(labels(0), SubTokenOptions(temperature=0, decoding="jacobi"))
    with pytest.raises(ValueError, match="needs draws"):
        model.start(labels(0), SubTokenOptions(temperature=0, later_temperature=1.0))
    with pytest.raises(ValueError, match="top_p must lie"):
        SubTokenOptions(later_top_p=1.5)


def test_files_with_moving_averages_give_those():
    state = {"encoder.conv.weight": torch.zeros(2), "model_ema.encoderconvweight": torch.ones(2)}
    state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    assert torch.equal(with_averages(state)["encoder.conv.weight"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"1 weights: decoder\.conv\.weight"):
        with_averages(state | {"decoder.conv.weight": torch.zeros(2)})


def test_images_of_one_token_are_refused():
    with pytest.raises(ValueError, match="a single token"):
        tiny("open_magvit2", image_size=4)


@torch.no_grad()
def test_convolutions_of_clips_do_not_look_ahead():
    down = tiny("open_magvit2_video").encoder.levels[1].resample
    x = torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[:, :, 3:] += 1
    assert down(x).shape[2:] == (3, 2, 2)
    assert torch.equal(down(x)[:, :, :2], down(y)[:, :, :2])
    assert not torch.equal(down(x)[:, :, 2], down(y)[:, :, 2])


@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (3, 2), (5, 3)])
def test_clips_come_back_with_their_frames(frames, steps):
    model = tiny("open_magvit2_video")  # one of its levels halves time
    spec = model.spec_for((3, frames, 16, 16))
    assert spec.grid == (steps, 4, 4)
    ids = model.encode(pixels(model)[:, :, :frames])
    assert model.decode(ids, grid=spec.grid).shape == (3, 3, frames, 16, 16)
    with pytest.raises(ValueError, match=r"a multiple of 2 more, got 4; take 3 frames"):
        model.spec_for((3, 4, 16, 16))


@torch.no_grad()
def test_with_weights_of_images_in_the_last_time_slice_a_frame_is_coded_as_an_image():
    image, clip = tiny("open_magvit2", channel_mult=(1, 2, 2)), tiny("open_magvit2_video", num_frames=1)
    state = clip.encoder.state_dict()
    for key, flat in image.encoder.state_dict().items():
        state[key] = torch.zeros_like(state[key]) if flat.ndim == 4 else flat
        if flat.ndim == 4:
            state[key][:, :, -1] = flat
    clip.encoder.load_state_dict(state)
    frames = pixels(image)
    torch.testing.assert_close(clip.latents(frames[:, :, None]), image.latents(frames), rtol=1e-4, atol=1e-4)
