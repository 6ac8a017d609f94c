"""The engine with steps of several tokens at any places, rows of the cache, and logits that are not finite."""

from __future__ import annotations

import pytest
import torch
from support.throwaway import Scattered
from support.throwaway.generator import SIZES
from support.tiny_models import labels, tiny
from torch import Tensor

from vistok.conditions import Condition
from vistok.draws import Draws, Keys
from vistok.generators.engine.cache import KVCache
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions, draw_ids

GREEDY = DecodingOptions(temperature=0)


@pytest.fixture
def scattered() -> tuple[Scattered, Condition, Draws]:
    torch.manual_seed(0)
    model = Scattered(**Scattered.tiny).eval()
    texts = Condition.from_ids(torch.tensor([[0, 4], [3, 1], [2, 2]]))
    draws = model.sampling_draws(Keys.range(0, 3), GREEDY)
    return model, Condition.together(labels(0, 2, 1), texts), draws


def in_order(ids: Tensor, order: Tensor) -> Tensor:
    return ids.gather(1, order)


@torch.no_grad()
def test_each_token_of_a_step_has_its_own_number(scattered):
    model, condition, draws = scattered
    options = DecodingOptions(temperature=1.2)
    ids = in_order(model.sample(condition, options, draws=draws), draws["order"])
    logits = model.whole(ids, draws["order"], condition)
    assert torch.equal(draw_ids(logits, draws["ids"], options), ids)


def test_chunks_and_forced_tokens_are_whole_steps(scattered):
    model, condition, draws = scattered
    whole = model.sample(condition, GREEDY, draws=draws)
    chunks = list(model.stream(condition, GREEDY, draws=draws))
    assert [chunk.tokens.shape[1] for chunk in chunks] == list(SIZES)
    assert torch.equal(torch.cat([chunk.positions for chunk in chunks], 1), draws["order"])
    session = model.start(condition, GREEDY, draws=draws)
    with pytest.raises(ValueError, match="3 tokens end within a step; the next steps have 1, 4, 9 tokens"):
        session.append(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 tokens end within a step"):
        list(session.generate(2))
    session.append(in_order(whole, draws["order"])[:, :5])
    assert torch.equal(session.tokens, whole * torch.zeros(3, 14).scatter(1, draws["order"][:, :5], 1).long())
    list(session.generate())
    assert torch.equal(session.tokens, whole)


def test_forced_places_are_taken_whatever_the_order(scattered):
    model, condition, draws = scattered
    ids, where = torch.full((3, 14), 7), torch.rand(3, 14) < 0.5
    session = model.start(condition, DecodingOptions(top_k=3), draws=draws)
    session.force(ids, where)
    list(session.generate())
    assert (session.tokens[where] == 7).all()
    assert (session.tokens[~where] != 7).any()
    with pytest.raises(ValueError, match=r"must be \(3, 14\), got \(3, 2\)"):
        session.force(ids[:, :2], where)


def test_plans_hold_every_token():
    plan = Plan.raster(4)
    assert [plan.places(step).tolist() for step in range(len(plan))] == [[[0]], [[1]], [[2]], [[3]]]
    assert (plan.step_at(3), Plan(torch.arange(4)[None], (1, 3)).step_at(2)) == (3, None)
    with pytest.raises(ValueError, match=r"steps of \(1, 2\) tokens do not make the 4"):
        Plan(torch.arange(4)[None], (1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the cache


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "vit_vqgan_gpt", "rar"])
def test_rows_of_different_lengths_compute_what_rows_alone_do(name):
    model, condition = tiny(name), labels(0, 4, 2)
    ids = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, model.num_entries)
    first, state = torch.zeros(1, 1, dtype=torch.int64), model.condition_state(condition)
    x, length = model.embed_condition(condition, first), model.condition_length
    model.transform(x, slice(0, length), model.attention_mask(condition, 0, length), cache.layers, *state)
    cache.visible = model.attention_mask(condition, model.num_entries - 1, model.num_entries)
    slots = torch.zeros(3, 4, dtype=torch.int64)
    layers, count = cache.at(slots), torch.zeros(3, dtype=torch.int64)
    expected = model.logits(ids, condition)
    for kept in ([1, 2, 3], [4, 1, 2], [2, 3, 1]):  # of 4 entries that each pass feeds
        places = count[:, None] + torch.arange(4)
        slots.copy_(places + length)
        entries = model.embed_tokens(ids.gather(1, places), places, places + 1)
        hidden = model.transform(entries, cache.positions(slots), cache.seen_from(slots), layers, *state)
        logits = model.entry_logits(hidden)
        torch.testing.assert_close(
            logits, expected.gather(1, (places + 1)[..., None].expand_as(logits)), rtol=1e-4, atol=1e-4
        )
        for layer in layers:
            layer.cut(torch.tensor(kept))
        count += torch.tensor(kept)


def test_rows_of_a_cache_are_chosen_and_repeated():
    cache = KVCache(1, 3, 1, 4, 2, shift_dim=2)
    cache.visible, cache.offsets = torch.rand(3, 1, 1, 4) < 0.5, torch.tensor([[0], [1], [2]])
    key = torch.arange(6.0).view(3, 1, 1, 2)
    cache.layers[0].append(key, -key)
    cache.layers[0].shift(key[:, 0])
    rows = torch.tensor([2, 0, 0])
    visible = cache.visible
    cache.choose(rows)
    new_key, new_value = cache.layers[0].append(key, key)
    assert torch.equal(new_key[:, :, :1], key[rows])
    assert torch.equal(new_value[:, :, :1], -key[rows])
    assert torch.equal(cache.layers[0].shift(key[:, 0]), key[rows][:, 0])
    assert torch.equal(cache.visible, visible[rows])
    assert cache.positions(torch.full((3, 1), 3)).tolist() == [[1], [3], [3]]


def test_what_a_cache_hides_is_not_seen():
    cache = KVCache(1, 2, 1, 4, 2)
    slots = torch.tensor([[0, 1], [2, 3]])
    assert cache.seen_from(slots)[:, 0].int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    cache.visible = torch.tensor([[[[False, True, True, True]]]])
    assert cache.seen_from(slots)[1, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Logits that are not finite


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [GREEDY, DecodingOptions(), DecodingOptions(top_p=0.9, guidance_scale=2.0)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_at_the_end(value, options, compiled):
    model, condition = tiny("llama"), labels(0, 4, 2)
    draws = model.sampling_draws(Keys.range(0, 3), options)
    if compiled:
        model.compile_decoding("eager")
    stream = model.stream(condition, options, draws=draws)
    for _ in range(5):
        next(stream)
    with torch.no_grad():
        model.output.weight[3, 3] = value
    seen = []
    with pytest.raises(ValueError, match="logits of token 5 are not finite in float32: the weights hold NaN or"):
        seen.extend(chunk.tokens for chunk in stream)
    assert len(seen) == 11
    assert all(0 <= int(ids.min()) <= int(ids.max()) < 32 for ids in seen)


def test_half_precision_that_overflows_is_told_the_remedy():
    model = tiny("llama").half()
    with torch.no_grad():
        model.output.weight.fill_(6e4)
        model.norm.weight.fill_(1e3)
    with pytest.raises(ValueError, match=r"token 0 are not finite in float16: .* take bfloat16 or float32"):
        model.sample(labels(0, 1), GREEDY)


@pytest.mark.parametrize("options", [GREEDY, DecodingOptions(), DecodingOptions(top_k=3), DecodingOptions(top_p=0.5)])
def test_ids_of_broken_logits_are_ids(options):
    logits = torch.full((2, 3, 8), torch.nan)
    logits[1] = torch.inf
    ids = draw_ids(logits, torch.rand(2, 3), options)
    assert ids.shape == (2, 3)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 8
