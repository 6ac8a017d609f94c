"""Draws of training: made on the device, keyed by sample."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import names, tiny

from vistok.draws import Keys

CPU = torch.device("cpu")
DRAWS = {
    "uniform": lambda keys: keys.uniform("a", 3, 50),
    "normal": lambda keys: keys.normal("a", 3, 50),
    "scalars": lambda keys: keys.normal("a"),
    "permutation": lambda keys: keys.permutation("a", 60),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_sample_has_its_draws_in_whichever_batch(draw):
    whole = draw(Keys(7, (3, 1, 12), 5).on(CPU))
    for row, index in enumerate((3, 1, 12)):
        assert torch.equal(draw(Keys(7, (index,), 5).on(CPU))[0], whole[row])
    assert torch.equal(draw(Keys(7, (0,), 5).on(CPU).at([12])), whole[2:])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_key_counts(draw):
    first = draw(Keys(7, (3,), 5).on(CPU))
    for other in (Keys(8, (3,), 5), Keys(7, (4,), 5), Keys(7, (3,), 6), Keys(7 + 2**32, (3,), 5), Keys(7, (-3,), 5)):
        assert not torch.equal(draw(other.on(CPU)), first)
    assert not torch.equal(Keys(7, (3,), 5).on(CPU).uniform("b", 3, 50), Keys(7, (3,), 5).on(CPU).uniform("a", 3, 50))


def test_draws_are_distributed_as_they_say():
    keys = Keys.range(0, 400).on(CPU)
    normal, uniform = keys.normal("n", 250).double(), keys.uniform("u", 250).double()
    assert normal.mean().abs() < 0.01
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert normal[:, :-1].flatten().dot(normal[:, 1:].flatten()) / normal[:, 1:].numel() < 0.01
    assert (normal[:-1] * normal[1:]).mean().abs() < 0.01, "neighbouring samples"
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    orders = keys.permutation("p", 10)
    assert torch.equal(orders.sort(1).values, torch.arange(10).expand(400, 10))
    assert (orders.float().mean(0) - 4.5).abs().max() < 0.6


def test_a_device_without_a_generator_gets_draws_of_the_cpu():
    there, here = Keys.range(0, 2).on(torch.device("lazy")), Keys.range(0, 2).on(CPU)
    assert torch.equal(there.normal("a", 3), here.normal("a", 3))


def test_no_samples():
    assert Keys.range(0, 0).on(CPU).normal("a", 3).shape == (0, 3)


@pytest.mark.parametrize("name", [*names("tokenizer"), *names("generator")])
def test_training_draws_of_every_model_are_those_of_the_samples(name):
    model = tiny(name)
    whole = model.training_draws(Keys(1, (5, 9, 2), 3).on(CPU))
    again = model.training_draws(Keys(1, (9,), 3).on(CPU))
    for key, draws in whole.items():
        assert torch.equal(again[key][0], draws[1]), key
    host = model.training_draws(Keys(1, (5, 9, 2), 3))
    assert {key: (value.shape, value.dtype) for key, value in host.items()} == {
        key: (value.shape, value.dtype) for key, value in whole.items()
    }
