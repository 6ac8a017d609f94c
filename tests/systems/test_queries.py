"""Generators with position queries: RandAR and LPD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import labels, tiny, token_ids
from torch import Tensor

from vistok.draws import Keys
from vistok.generators.engine.queries import QueryOptions, cosine_groups
from vistok.generators.lpd import LPDOptions
from vistok.generators.lpd.locality import locality_order
from vistok.generators.lpd.model import group_numbers
from vistok.generators.randar import sample_larger
from vistok.generators.randar.larger import enlarged
from vistok.types import TokenSpec

NAMES = ("randar", "lpd")
SIZES = ((1,) * 16, (1, 2, 3, 4, 6), (3, 1, 5, 7), (16,))
THRESHOLDS = {"proximity_threshold": 1.0, "repulsion_threshold": 1.0}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def random_orders(seed: int, batch: int = 3) -> Tensor:
    return Keys.range(seed, batch).permutation("order", 16)


def options_of(name: str, **given) -> QueryOptions:
    return LPDOptions(order="random", **given) if name == "lpd" else QueryOptions(**given)


def whole_passes(name: str, model, ids: Tensor, order: Tensor, condition, sizes: tuple[int, ...]) -> Tensor:
    """Logits (B, L, V), each group computed anew from [what is known, its own queries], without a cache."""
    if name == "lpd":
        return model.logits(ids, condition, order, groups=group_numbers(sizes)[None])
    known, places, logits, start = ids.gather(1, order), order, [], 0
    for size in sizes:
        asked = places[:, start : start + size]
        parts = [model._embed_class(condition)]
        if start:
            parts.append(model._embed_pairs(known[:, :start], places[:, :start]))
        x = torch.cat([*parts, model.instructions(asked)], 1)
        pairs = places[:, :start].repeat_interleave(2, 1)
        positions = torch.cat([torch.zeros_like(order[:, :1]), 1 + pairs, 1 + asked], 1)
        logits.append(model.head(model.transform(x, positions, None, None)[:, -size:]))
        start += size
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_cached_steps_equal_recomputation(name, sizes):
    model, condition, order = tiny(name), labels(0, 4, -1), random_orders(1)
    session = model.start(condition, options_of(name, temperature=0, group_sizes=sizes), draws={"order": order})
    cached = []
    while session.step < len(session.plan):
        cached.append(session.next_logits().clone())
        session.commit([cached[-1].argmax(-1)])
    expected = whole_passes(name, model, session.tokens, order, condition, sizes)
    torch.testing.assert_close(torch.cat(cached, 1), expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_equals_the_training_pass(name):
    model, condition, order = tiny(name), labels(0, 4, -1), random_orders(2)
    options = options_of(name, temperature=0, num_steps=16, guidance_scale=2.5)
    ids = model.sample(condition, options, draws={"order": order})
    rows = [model.logits(ids, one, order) for one in (condition, condition.null())]
    guided = rows[1] + 2.5 * (rows[0] - rows[1])
    assert torch.equal(guided.argmax(-1), ids.gather(1, order))


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(NAMES), st.integers(0, 2**31), st.integers(0, 15))
@torch.no_grad()
def test_a_prediction_sees_what_comes_before_in_order_and_nothing_else(name, seed, changed):
    model, orders, condition = tiny(name), random_orders(seed), labels(0, 4, -1)
    ids = token_ids(model)
    other = ids.scatter_add(1, orders[:, changed : changed + 1], torch.ones(3, 1, dtype=torch.int64)) % 32
    before, after = (model.logits(given, condition, orders) for given in (ids, other))
    torch.testing.assert_close(before[:, : changed + 1], after[:, : changed + 1])
    if changed < 15:
        assert not torch.allclose(before[:, changed + 1 :], after[:, changed + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_a_given_prefix_continues_as_it_was_sampled(name):
    model, condition = tiny(name), labels(0, 1, 2)
    options = model.options_type(group_sizes=(1, 2, 3, 4, 6))
    draws = model.sampling_draws(Keys.range(0, 3), options)
    ids = model.sample(condition, options, draws=draws)
    session = model.start(condition, options, draws=draws)
    session.append(ids.gather(1, draws["order"])[:, :6])
    for _ in session.generate():
        pass
    assert torch.equal(session.tokens, ids)
    with pytest.raises(ValueError, match="2 tokens end within a step"):
        model.start(condition, options, draws=draws).append(ids[:, :2])


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_sample_in_any_batch(name):
    model, options = tiny(name), tiny(name).options_type(guidance_scale=(1.0, 3.0), guidance_schedule="linear-done")

    def sample(*indices: int) -> Tensor:
        return model.sample(labels(*indices), options, draws=model.sampling_draws(Keys.of(3, indices), options))

    assert torch.equal(sample(4, 0, 2), torch.cat([sample(4), sample(0), sample(2)]))


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_every_parameter(name):
    model = tiny(name)
    draws = model.training_draws(Keys.range(0, 3)) | {"drop": torch.tensor([0.0, 0.5, 0.5])}
    model(token_ids(model), labels(0, 1, 2), draws=draws).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert torch.equal(draws["order"].sort(1).values, torch.arange(16).expand(3, -1))


@pytest.mark.parametrize("name", NAMES)
def test_bad_orders_and_groups_are_refused(name):
    model, condition = tiny(name), labels(0, 1, 2)
    greedy = options_of(name, temperature=0)
    with pytest.raises(ValueError, match=r"names each of the places 0\.\.15 once"):
        model.start(condition, greedy, draws={"order": torch.zeros(3, 16, dtype=torch.int64)})
    with pytest.raises(ValueError, match="sum to 3, not to 16 tokens"):
        model.start(condition, options_of(name, temperature=0, group_sizes=(1, 2)))
    with pytest.raises(ValueError, match=r"num_steps must lie in 1\.\.16.*got 17"):
        model.start(condition, options_of(name, temperature=0, num_steps=17))
    with pytest.raises(ValueError, match="leave num_steps out"):
        options_of(name, num_steps=3, group_sizes=(1, 15))
    with pytest.raises(ValueError, match="from 1 on"):
        options_of(name, group_sizes=(0, 16))
    raster = torch.arange(16).expand(3, -1)
    for order, message in (
        (random_orders(0)[:, :5], r"orders must be \(3, 16\)"),
        (raster[:2], r"orders must be \(3, 16\)"),
        (raster * 0, r"names each of the places 0\.\.15 once"),
        (raster + 1, r"names each of the places 0\.\.15 once"),
        (raster.float(), "by integers, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(token_ids(model), condition, draws={"order": order})
        with pytest.raises(ValueError, match=message):
            model.logits(token_ids(model), condition, order)
    with pytest.raises(ValueError, match="2 orders do not fit 3 rows"):
        model.start(condition, greedy, draws={"order": raster[:2]})
    with pytest.raises(ValueError, match=r"whole number, got 2\.5"):
        options_of(name, num_steps=2.5)
    with pytest.raises(ValueError, match="no compiled decoding"):
        model.compile_decoding()
    with pytest.raises(ValueError, match="jacobi"):
        model.start(condition, options_of(name, temperature=0, decoding="jacobi"))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_null_class_guidance_is_refused(name):
    model = tiny(name, condition_dropout=0.0)
    assert model.sample(labels(0, 4), options_of(name, temperature=0)).shape == (2, 16)
    with pytest.raises(ValueError, match="without a null condition"):
        model.sample(labels(0, 4), options_of(name, temperature=0, guidance_scale=2.0))


@given(st.integers(1, 300), st.data())
def test_cosine_groups_are_all_tokens(length, data):
    num_steps = data.draw(st.integers(1, length))
    sizes = cosine_groups(num_steps, length)
    assert sum(sizes) == length
    assert min(sizes) >= 1


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_keeps_what_it_should_and_sees_all_of_it(name):
    model, condition, ids = tiny(name), labels(0, 4, 2), token_ids(tiny(name))
    regenerate = torch.zeros(3, 16, dtype=torch.bool)
    regenerate[0, :5], regenerate[1, 7:] = True, True  # of the third image nothing
    edited = model.edit(ids, regenerate, condition, options_of(name, temperature=0, num_steps=16))
    assert torch.equal(edited[~regenerate], ids[~regenerate])
    for row, count in ((0, 11), (1, 7)):
        order = regenerate[row].int().argsort(stable=True)[None]
        groups = {"groups": group_numbers((count, *(1,) * (16 - count)))[None]} if name == "lpd" else {}
        logits = model.logits(edited[row : row + 1], condition[row : row + 1], order, **groups)
        assert torch.equal(logits.argmax(-1)[:, count:], edited[row : row + 1].gather(1, order)[:, count:])
    for options in (options_of(name), options_of(name, num_steps=3, guidance_scale=2.0)):
        drawn = model.edit(ids, regenerate[1], condition, options, draws=model.sampling_draws(Keys.range(0, 3)))
        assert torch.equal(drawn[:, :7], ids[:, :7])
        assert not torch.equal(drawn[:, 7:], ids[:, 7:])
    with pytest.raises(ValueError, match="needs draws"):
        model.edit(ids, regenerate, condition, options_of(name))
    with pytest.raises(ValueError, match="not group_sizes"):
        model.edit(ids, regenerate, condition, options_of(name, temperature=0, group_sizes=(16,)))
    for num_steps in (0, 17):  # the limit is that of whole images
        with pytest.raises(ValueError, match=rf"num_steps must lie in 1\.\.16, .* got {num_steps}"):
            model.edit(ids, regenerate, condition, options_of(name, temperature=0, num_steps=num_steps))
    with pytest.raises(ValueError, match=r"regenerate \(16,\) or \(B, 16\)"):
        model.edit(ids, regenerate[:, :3], condition, options_of(name, temperature=0))


# ---------------------------------------------------------------------------------------------------------------------
# RandAR's instructions, LPD's order


@torch.no_grad()
def test_an_instruction_depends_on_its_place_alone():
    model = tiny("randar")
    table = model.instructions(torch.arange(16)[None])[0]
    orders = random_orders(5)
    assert torch.equal(model.instructions(orders), table[orders])
    torch.testing.assert_close(table.norm(dim=1), model.position_instruction.norm().expand(16))


def test_tokens_on_no_raster():
    spec = TokenSpec(10, 32, dim=4)
    with pytest.raises(ValueError, match="needs tokens on an image raster"):
        tiny("randar", spec=spec)
    models = tiny("lpd", spec=spec), tiny("randar", spec=spec, **tiny("randar").plain_sequence)
    for model in models:
        assert model.sample(labels(0, 1), draws=model.sampling_draws(Keys.range(0, 2))).shape == (2, 10)
    with pytest.raises(ValueError, match="take order='random'"):
        models[0].sampling_draws(Keys.range(0, 2), LPDOptions(order="locality"))


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 3.0, 99.0]), st.data())
def test_a_local_order_is_a_permutation(height, width, seed, proximity, data):
    count, rng = height * width, np.random.default_rng(seed)
    sizes = [1]
    while sum(sizes) < count:
        sizes.append(data.draw(st.integers(1, count - sum(sizes))))
    ties = rng.random((len(sizes), count))
    thresholds = THRESHOLDS | {"proximity_threshold": proximity}
    order = locality_order((height, width), sizes, seed % count, ties, **thresholds)
    assert sorted(order.tolist()) == list(range(count))
    assert order[0] == seed % count


def test_a_local_group_is_near_what_is_known_and_apart():
    order = locality_order((8, 8), [1, 1, 2, 60], 27, np.random.default_rng(0).random((4, 64)), **THRESHOLDS)
    second, third, fourth = (np.array(divmod(int(place), 8)) for place in order[1:4])
    assert np.abs(second - (3, 3)).sum() == 1
    assert np.abs(third - fourth).max() > 1


@pytest.mark.parametrize(
    ("sizes", "first", "message"),
    [([2, 14], 0, "must begin with 1"), ([1, 3], 0, "sum to the 16"), ([1, 15], 16, "one of 0..15")],
)
def test_a_local_order_of_wrong_sizes_is_refused(sizes, first, message):
    with pytest.raises(ValueError, match=message):
        locality_order((4, 4), sizes, first, np.zeros((len(sizes), 16)), **THRESHOLDS)


def test_groups_that_do_not_begin_with_one_token_need_a_random_order():
    model = tiny("lpd")
    sizes, keys = {"group_sizes": (4, 4, 8)}, Keys.range(0, 3)
    with pytest.raises(ValueError, match="the first group has 4; let group_sizes begin with 1, or take order='random'"):
        model.sampling_draws(keys, LPDOptions(**sizes))
    options = LPDOptions(**sizes, order="random")
    drawn = model.sample(labels(0, 1, 2), options, draws=model.sampling_draws(keys, options))
    assert drawn.shape == (3, 16)


def test_guidance_that_rises_is_one_number_for_a_group_or_differs_within_it():
    for name, second_group in (("randar", [1.25]), ("lpd", [1.25, 1.5])):
        options = options_of(name, guidance_scale=5.0, guidance_schedule="linear-done", group_sizes=(1, 2, 13))
        weights = tiny(name).guidance_weights(options.guidance, tiny(name).steps({}, options))
        assert torch.as_tensor(weights[0][0]).flatten().tolist() == [1.0]
        assert torch.as_tensor(weights[1][0]).flatten().tolist() == second_group


def test_guidance_may_rise_from_any_scale():
    options = QueryOptions(guidance_scale=(2.0, 4.0), guidance_schedule="linear-done", num_steps=16)
    scales = [
        weights[0] for weights in tiny("randar").guidance_weights(options.guidance, tiny("randar").steps({}, options))
    ]
    assert scales == [2 + 2 * token / 16 for token in range(16)]


def test_steps_of_the_cosine():
    assert cosine_groups(1, 5) == (1, 4)
    assert cosine_groups(5, 5) == (1,) * 5
    assert [len(cosine_groups(steps, 256)) for steps in (8, 32, 88, 256)] == [8, 32, 88, 256]


def test_the_published_groups_are_taken():
    model = tiny("lpd", spec=TokenSpec(256, 32, dim=4, grid=(16, 16)))
    assert model.default_steps == 20
    for steps in (20, 32):
        sizes = model.group_sizes(LPDOptions(num_steps=steps))
        assert (len(sizes), sum(sizes), sizes[0]) == (steps, 256, 1)
    with pytest.raises(ValueError, match="let group_sizes begin with 1"):
        tiny("lpd").sampling_draws(Keys.range(0, 1), LPDOptions(group_sizes=(2, 14)))
    with pytest.raises(ValueError, match="order must be"):
        LPDOptions(order="raster")


def test_a_larger_grid_lies_around_a_sample_of_the_trained_size():
    model, condition, keys = tiny("randar"), labels(0, 1, 2), Keys.range(0, 3)
    options = QueryOptions(num_steps=5, guidance_scale=2.0)
    ids = sample_larger(model, condition, options, keys=keys)
    assert ids.shape == (3, 64)
    coarse = model.sample(condition, options, draws=model.sampling_draws(keys, options))
    assert torch.equal(ids.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1), coarse)
    assert torch.equal(sample_larger(model, condition[1:2], options, keys=keys.at([1])), ids[1:2])
    assert len(enlarged(model).steps({}, QueryOptions(num_steps=20)).order[0]) == 64
    assert model.spec.length == 16  # the model itself is unchanged


def test_larger_grids_turn_fast_frequencies_on_and_slow_ones_in_the_range_of_training():
    model = tiny("randar")
    small, large = model.rotation, enlarged(model, 1).rotation
    pairs = small.cos.shape[1] // 2
    angle = torch.atan2(large.sin[1:], large.cos[1:]).unflatten(0, (8, 8))
    old = torch.atan2(small.sin[1:], small.cos[1:]).unflatten(0, (4, 4))
    torch.testing.assert_close(angle[:4, :4, 0], old[..., 0])  # the fastest frequency continues by row
    torch.testing.assert_close(angle[7, 7, 1:pairs], old[3, 3, 1:pairs])  # the others end at the angle of training
    assert float(large.cos[0].abs().max()) == 0  # attention to the class has no position
    plain = enlarged(model, pairs).rotation
    torch.testing.assert_close(plain.cos[1:].unflatten(0, (8, 8))[:4, :4], small.cos[1:].unflatten(0, (4, 4)))


def test_larger_grids_that_cannot_be():
    keys = Keys.range(0, 3)
    with pytest.raises(ValueError, match=r"these are 16 of grid None with positions 'rope1d'"):
        sample_larger(tiny("randar", spec=TokenSpec(16, 32, dim=4), positions="rope1d"), labels(0, 1, 2), keys=keys)
    with pytest.raises(ValueError, match=r"extrapolated must lie in 0\.\.\d+, the frequencies of an axis; got 99"):
        sample_larger(tiny("randar"), labels(0, 1, 2), keys=keys, extrapolated=99)
    with pytest.raises(ValueError, match="give num_steps, not group_sizes"):
        sample_larger(tiny("randar"), labels(0, 1, 2), QueryOptions(group_sizes=(1,) * 16), keys=keys)
