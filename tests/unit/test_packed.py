"""Packed weights give the results of plain ones, follow changes of the model, and do not change it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.tiny_models import labels, single_token_generators, tiny
from torch import nn
from torch.nn import functional as F

from vistok.draws import Keys
from vistok.generators.engine.packed import DecodingCopies, PackedGatedMLP, PackedLinear, _packable_dtypes, pack
from vistok.generators.engine.sampling import DecodingOptions
from vistok.nn.mlp import SwiGLU

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PACKS = bool(_packable_dtypes())
GREEDY = DecodingOptions(temperature=0)


def packed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


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
    with torch.inference_mode():
        like = pack(layer, 8)
        assert packed(like)
        torch.testing.assert_close(like(x), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@torch.no_grad()
@pytest.mark.skipif(not PACKS, reason="nothing is packed on this processor")
def test_a_gated_feed_forward_is_two_products_and_computes_the_same():
    torch.manual_seed(0)
    mlp, x = SwiGLU(32, 96, drop=0.5).eval(), torch.randn(8, 1, 32)
    like = pack(mlp, 8)
    assert isinstance(like, PackedGatedMLP)
    assert len(packed(like)) == 2
    torch.testing.assert_close(like(x), mlp(x), rtol=1e-5, atol=1e-5)
    mlp.train()
    assert (like(x) == 0).any()  # dropout is that of the model


def add_hook(mlp: SwiGLU) -> None:
    mlp.gate.register_forward_hook(lambda layer, inputs, output: 2 * output)


def add_pre_hook(mlp: SwiGLU) -> None:
    mlp.up.register_forward_pre_hook(lambda layer, inputs: 2 * inputs[0])


def hook_the_whole(mlp: SwiGLU) -> None:
    mlp.register_forward_hook(lambda layer, inputs, output: 2 * output)


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
@pytest.mark.parametrize("change", [add_hook, add_pre_hook, hook_the_whole, replace_forward, wrap])
def test_layers_that_do_more_than_multiply_are_not_joined(change):
    torch.manual_seed(0)
    mlp, x = SwiGLU(32, 96).eval(), torch.randn(8, 1, 32)
    copies = DecodingCopies()
    copies.of(mlp, 8)
    change(mlp)  # after the first copy
    expected = mlp(x)
    torch.testing.assert_close(copies.of(mlp, 8).model(x), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_layers_are_left_alone():
    model, condition = tiny("llama"), labels(0, 4, 2, 1)
    model.sample(condition, GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decoding_copies.of(model, 8).model is model
        ids = model.sample(condition, GREEDY)
        streamed = [chunk.tokens for chunk in model.stream(condition, GREEDY)]
    assert torch.equal(torch.cat(streamed, 1), ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_parts_are_left_alone(dtype):
    inside, whole, free = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)
    whole.compile(backend="eager")
    model = nn.Sequential(whole, torch.compile(inside, backend="eager"), free).to(dtype)
    model.compile(backend="eager")  # as training does, which samples with the model's parts
    like = pack(model, 8)
    assert len(packed(like)) == (dtype in _packable_dtypes())
    assert like[0] is model[0]
    assert like[1] is model[1]


def test_few_rows_and_quantised_layers_stay_plain():
    class Quantised(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = Quantised(torch.randn(16, 16))
    assert pack(model, 1) is model
    like = pack(model, 8)
    assert like[1] is model[1]
    assert len(packed(like)) == PACKS


def optimise(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()


def scale(model: nn.Module) -> None:
    with torch.no_grad():
        model.output.weight.mul_(-2)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: -value for name, value in model.state_dict().items()})


def exchange(model: nn.Module) -> None:
    model.blocks[0].ffn.gate = nn.Linear(16, model.blocks[0].ffn.gate.out_features, bias=False)


def assign(model: nn.Module) -> None:
    model.output.weight.data = -model.output.weight.data


def cast(model: nn.Module) -> None:
    model.double()


@pytest.mark.parametrize("change", [optimise, scale, load, exchange, assign, cast])
def test_changed_weights_are_packed_anew(change):
    model, condition = tiny("llama"), labels(0, 4, 2, 1)
    model.sample(condition, GREEDY)
    change(model)
    fresh = copy.deepcopy(model)
    assert torch.equal(model.sample(condition, GREEDY), fresh.sample(condition, GREEDY))


def test_weights_that_change_between_chunks_of_a_stream_are_packed_anew():
    model, condition = tiny("llama"), labels(0, 4, 2, 1)
    expected = model.sample(condition, GREEDY)
    stream = model.stream(condition, GREEDY)
    chunks = [next(stream).tokens for _ in range(3)]
    with torch.no_grad():
        model.output.weight.neg_()
    chunks += [next(stream).tokens]
    assert torch.equal(torch.cat(chunks[:3], 1), expected[:, :3])
    assert torch.equal(chunks[3][:, 0], model.logits(expected, condition)[:, 3].argmax(-1))


@pytest.mark.skipif(not PACKS, reason="nothing is packed on this processor")
def test_samples_and_streams_share_a_copy_that_training_frees():
    model, condition = tiny("llama"), labels(0, 4, 2, 1)
    model.sample(condition, GREEDY)
    first = model.decoding_copies.of(model, 4)
    list(model.stream(condition, GREEDY))
    assert model.decoding_copies.of(model, 4) is first
    assert model.decoding_copies.of(model, 8) is not first
    assert packed(first.model)
    assert not packed(model)
    assert copy.deepcopy(model).decoding_copies._last is None
    assert pickle.loads(pickle.dumps(model)).decoding_copies._last is None
    model.train()
    assert model.decoding_copies._last is None


@pytest.mark.parametrize("name", single_token_generators())
def test_sampling_is_packed_and_equals_the_stream(name):
    model, condition = tiny(name), labels(0, 4, 2, 1)
    draws = model.sampling_draws(Keys.range(0, 4))
    ids = model.sample(condition, draws=draws)
    assert bool(packed(model.decoding_copies.of(model, 4).model)) == PACKS
    streamed = torch.zeros_like(ids)
    for chunk in model.stream(condition, draws=draws):
        streamed.scatter_(1, chunk.positions, chunk.tokens)
    assert torch.equal(streamed, ids)
