"""RAR: any order, the annealing of orders, and partly known sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import labels, tiny, token_ids

from vistok.draws import Keys


def random_orders(seed: int, batch: int = 3) -> torch.Tensor:
    return Keys.range(seed, batch).permutation("order", 16)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(0, 15))
@torch.no_grad()
def test_a_prediction_sees_what_comes_before_in_order_and_nothing_else(seed, changed):
    model, orders, condition = tiny("rar"), random_orders(seed), labels(0, 4, -1)
    ids = token_ids(model)
    other = ids.scatter_add(1, orders[:, changed : changed + 1], torch.ones(3, 1, dtype=torch.int64)) % 32
    before, after = (model.logits(given, condition, orders) for given in (ids, other))
    torch.testing.assert_close(before[:, : changed + 1], after[:, : changed + 1])
    if changed < 15:
        assert not torch.allclose(before[:, changed + 1 :], after[:, changed + 1 :])


@torch.no_grad()
def test_the_place_to_be_predicted_counts():
    model, ids = tiny("rar"), token_ids(tiny("rar"))
    orders = torch.arange(16).expand(3, -1).clone()
    swapped = orders.clone()
    swapped[:, 14:] = torch.tensor([15, 14])
    before, after = (model.logits(ids, labels(0, 1, 2), order) for order in (orders, swapped))
    torch.testing.assert_close(before[:, :14], after[:, :14])
    assert not torch.allclose(before[:, 14], after[:, 14])  # the same tokens, but for another position


def test_the_share_of_random_orders_falls_from_one_to_zero():
    model = tiny("rar", random_until=100, raster_from=200)
    assert [model.random_share(step) for step in (0, 100, 150, 200, 999)] == [1, 1, 0.5, 0, 0]
    orders = model.training_draws(Keys.range(0, 400, step=150))["order"]
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(400, -1))
    raster = (orders == torch.arange(16)).all(1).float().mean().item()
    assert raster == pytest.approx(0.5, abs=0.1)
    assert (model.training_draws(Keys.range(0, 9, step=200))["order"] == torch.arange(16)).all()


def test_orders_may_turn_from_random_to_raster_at_one_step():
    model = tiny("rar", random_until=5, raster_from=5)
    assert [model.random_share(step) for step in (0, 4, 5, 6)] == [1, 1, 0, 0]


def test_orders_may_be_raster_from_the_start():
    assert tiny("rar", random_until=0, raster_from=0).random_share(0) == 0
    with pytest.raises(ValueError, match="must rise from 0, got 5 and 3"):
        tiny("rar", random_until=5, raster_from=3)


def test_training_in_raster_order_is_plain_next_token_prediction():
    model, ids, condition = tiny("rar"), token_ids(tiny("rar")), labels(0, 1, 2)
    plain = model(ids, condition).loss
    raster = model(ids, condition, draws={"order": torch.arange(16).expand(3, -1)}).loss
    torch.testing.assert_close(plain, raster)
    expected = torch.nn.functional.cross_entropy(model.logits(ids, condition).flatten(0, 1), ids.flatten())
    torch.testing.assert_close(plain, expected)


def test_orders_of_another_length_are_refused():
    model = tiny("rar")
    with pytest.raises(ValueError, match=r"orders must be \(3, 16\)"):
        model(token_ids(model), labels(0, 1, 2), draws={"order": random_orders(0)[:, :5]})


def test_known_tokens_are_taken_and_fed_on():
    model, condition = tiny("rar"), labels(0, 1, 2)
    real, draws = token_ids(model, seed=5), model.sampling_draws(Keys.range(0, 3))
    kept = Keys.range(3, 3).uniform("kept", 16) < 0.5
    tokens = model.sample_forced(real, kept, condition, draws=draws)
    assert torch.equal(tokens[kept], real[kept])
    assert not torch.equal(tokens[~kept], real[~kept])
    # A later token is drawn given all earlier ones, known tokens included.
    prefix = model.start(condition, draws=draws)
    prefix.append(tokens[:, :9])
    next(iter(prefix.generate(1)))
    drawn = ~kept[:, 9]
    assert torch.equal(prefix.tokens[:, 9][drawn], tokens[:, 9][drawn])
