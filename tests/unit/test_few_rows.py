"""Packed weights compute what plain ones do, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_models import labels, next_token_generators, tiny, token_ids
from torch import nn
from torch.nn import functional as F

from vistok.draws import Keys
from vistok.generators.engine.few_rows import _packable_dtypes, layers_for
from vistok.generators.engine.sampling import DecodingOptions
from vistok.nn.mlp import SwiGLU

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def packed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 48), (8, 1, 48), (3, 5, 48), (1, 48)])
def test_products_are_those_of_plain_layers(dtype, bias, shape):
    if dtype not in _packable_dtypes():
        pytest.skip(f"this processor does not pack {dtype}")
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 80, bias=bias)).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = layer(x)
    with torch.inference_mode(), layers_for(layer, 8):
        assert packed(layer)
        torch.testing.assert_close(layer(x), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_a_gated_feed_forward_is_two_products_and_computes_the_same():
    torch.manual_seed(0)
    mlp, x = SwiGLU(32, 96, drop=0.5), torch.randn(8, 1, 32)
    expected = mlp.eval()(x)
    with torch.inference_mode(), layers_for(mlp, 8):
        assert packed(mlp) == ([mlp, mlp.down] if _packable_dtypes() else [])
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
    with layers_for(mlp.train(), 8):  # dropout is left alone
        assert mlp not in packed(mlp)


def add_hook(mlp: SwiGLU) -> None:
    mlp.gate.register_forward_hook(lambda layer, inputs, output: 2 * output)


def add_pre_hook(mlp: SwiGLU) -> None:
    mlp.up.register_forward_pre_hook(lambda layer, inputs: 2 * inputs[0])


def replace_forward(mlp: SwiGLU) -> None:
    mlp.up.forward = lambda x: 2 * F.linear(x, mlp.up.weight)


def wrap(mlp: SwiGLU) -> None:
    class Adapted(nn.Module):
        def __init__(self, layer: nn.Linear):
            super().__init__()
            self.layer = layer

        weight, bias = property(lambda self: self.layer.weight), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.layer(x)

    mlp.up = Adapted(mlp.up)


@torch.no_grad()
@pytest.mark.parametrize("change", [add_hook, add_pre_hook, replace_forward, wrap])
def test_layers_that_do_more_than_multiply_are_not_joined(change):
    torch.manual_seed(0)
    mlp, x = SwiGLU(32, 96).eval(), torch.randn(8, 1, 32)
    change(mlp)
    expected = mlp(x)
    with layers_for(mlp, 8):
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_layers_are_left_alone():
    model, condition = tiny("llama"), labels(0, 4, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        ids = model.sample(condition, DecodingOptions(temperature=0))
        streamed = [chunk.tokens for chunk in model.stream(condition, DecodingOptions(temperature=0))]
    assert torch.equal(torch.cat(streamed, 1), ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_parts_are_left_alone(dtype):
    inside, whole, free = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)
    whole.compile(backend="eager")
    model = nn.Sequential(whole, torch.compile(inside, backend="eager"), free).to(dtype)
    model.compile(backend="eager")  # as training does, which samples with the model's parts
    before = packed(model)
    with layers_for(model, 8):
        assert set(packed(model)) - set(before) == ({free} if dtype in _packable_dtypes() else set())


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    ids, condition = token_ids(model), labels(0, 1, 2)
    with layers_for(model, 8):
        count = len(packed(model))
        with layers_for(model, 8):  # a sample within a sample
            assert len(packed(model)) == count
        assert len(packed(model)) == count
    with pytest.raises(ValueError, match="out of range"), layers_for(model, 8):
        model.sample(labels(*[9] * 8), DecodingOptions(temperature=0))
    assert not packed(model)
    before = model(ids, condition).loss
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        model.output.weight.mul_(2)  # the next packing sees new weights
    session = model.start(condition, DecodingOptions(temperature=0, guidance_scale=2.0))
    streamed = torch.cat([chunk.tokens for chunk in session.generate()], 1)
    assert torch.equal(model.sample(condition, DecodingOptions(temperature=0, guidance_scale=2.0)), streamed)
    assert not packed(copy.deepcopy(model))


def test_few_rows_and_quantised_layers_stay_plain():
    class Quantised(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = Quantised(torch.randn(16, 16))
    with layers_for(model, 1):
        assert not packed(model)
    with layers_for(model, 8):
        assert packed(model) == ([model[0]] if _packable_dtypes() else [])


@pytest.mark.parametrize("name", next_token_generators())
def test_sampling_is_packed_and_equals_the_stream(name):
    model, condition = tiny(name), labels(0, 4, 2, 1)
    draws = model.sampling_draws(Keys.range(0, 4))
    seen = []
    model.output.register_forward_hook(lambda module, *_: seen.append("forward" in vars(module)))
    ids = model.sample(condition, draws=draws)
    assert all(seen) or not _packable_dtypes()
    chunks = [chunk.tokens for chunk in model.stream(condition, draws=draws)]
    assert torch.equal(torch.cat(chunks, 1), ids)
    assert not packed(model)
