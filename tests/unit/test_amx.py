"""The kernel for AMX multiplies as PyTorch does, and PyTorch does what it cannot."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.generators.engine import amx
from vistok.generators.engine.few_rows import _packable_dtypes, layers_for
from vistok.nn.norms import RMSNorm

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernel():
    if amx._kernels() is None:
        pytest.skip("this machine has no AMX, or no C++ compiler")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """Equal but for the last bit of bfloat16."""
    assert actual.dtype == BF16
    torch.testing.assert_close(actual.float(), exact, rtol=2**-8, atol=1e-3)


@given(
    rows=st.integers(1, amx.MOST_ROWS),
    tiles=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_products_are_those_of_float32_rounded_once(kernel, rows, tiles, with_bias, seed):
    columns, outputs = 32 * tiles[0], 16 * tiles[1]
    x, weight = random(rows, columns, seed=seed), random(outputs, columns, seed=seed + 1)
    bias = random(outputs, seed=seed + 2) if with_bias else None
    with torch.no_grad():
        assert_rounded(amx.linear(x, weight, bias), expected(x, weight, bias))


def test_rows_do_not_see_each_other_nor_those_of_the_call_before(kernel):
    weight, x = random(48, 64), random(32, 64)
    with torch.no_grad():
        amx.linear(torch.full_like(x, torch.nan), weight, None)
        few = amx.linear(x[:3], weight, None)
        spoiled = x.clone()
        spoiled[1] = torch.inf
        many = amx.linear(spoiled, weight, None)
    assert torch.equal(few, amx_rows(x, weight)[:3])
    assert torch.equal(many[2:], amx_rows(x, weight)[2:])
    assert not many[1].isfinite().any()


@torch.no_grad()
def amx_rows(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([amx.linear(row[None], weight, None) for row in x])


def test_strided_inputs_of_any_rank(kernel):
    x, weight = random(4, 2, 96).transpose(0, 1), random(16, 96)
    with torch.inference_mode():
        y = amx.linear(x, weight, None)
        assert amx.linear(x[:, 0, :], weight, None).shape == (2, 16)
    assert y.shape == (2, 4, 16)
    assert_rounded(y, expected(x, weight, None))


@pytest.mark.parametrize("x", [random(amx.MOST_ROWS + 1, 64), random(0, 64)], ids=["many rows", "none"])
def test_pytorch_computes_what_the_kernel_does_not(x):
    weight = random(32, 64)
    with torch.no_grad():
        assert torch.equal(amx.linear(x, weight, None), F.linear(x, weight))


def test_gradients_flow_and_wrong_shapes_raise_as_in_pytorch():
    weight = random(32, 64).requires_grad_()
    amx.linear(random(2, 64), weight, None).sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        amx.linear(random(2, 32), weight, None)
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        amx.linear(random(2, 64).float(), weight, None)


@torch.no_grad()
@pytest.mark.parametrize(
    "bias",
    [random(64)[::2], random(1).expand(32), random(33)[1:]],
    ids=["every second", "one for all", "unaligned"],
)
def test_biases_may_lie_in_memory_as_they_like(kernel, bias):
    x, weight = random(4, 64), random(32, 64)
    assert_rounded(amx.linear(x, weight, bias), expected(x, weight, bias))


@torch.no_grad()
@pytest.mark.parametrize("bias", [random(32).float(), random(3)], ids=["float32", "too short"])
def test_biases_that_do_not_fit_raise_as_in_pytorch(bias):
    with pytest.raises(RuntimeError):
        amx.linear(random(4, 64), random(32, 64), bias)


def test_layers_may_be_given_weights_that_do_not_suit(kernel):
    model, x = nn.Sequential(nn.Linear(64, 64)).to(BF16), random(8, 64)
    with torch.inference_mode(), layers_for(model, 8):
        model[0].weight = nn.Parameter(random(64, 64).t())
        assert_rounded(model(x), expected(x, model[0].weight, model[0].bias))
        model.float()
        torch.testing.assert_close(model(x.float()), expected(x, model[0].weight, model[0].bias))


@given(rows=st.integers(1, amx.MOST_ROWS), tiles=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=40, deadline=None)
def test_norms_are_those_of_pytorch(kernel, rows, tiles, scale):
    norm, x = RMSNorm(32 * tiles).to(BF16), scale * random(rows, 1, 32 * tiles)
    with torch.no_grad():
        norm.weight.copy_(random(32 * tiles, seed=1))
        expected = norm(x)
        with layers_for(norm, rows):
            assert "forward" in vars(norm)
            torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=0)  # rounded twice
            assert torch.equal(norm(x[:, 0]), norm(x)[:, 0])
        assert torch.equal(
            amx.rms_norm(x.float(), norm.weight, norm.eps),
            F.rms_norm(x.float(), norm.weight.shape, eps=norm.eps) * norm.weight,
        )


def test_threads_do_not_share_their_rearranged_inputs(kernel):
    weight, inputs = random(512, 256), [random(8, 256, seed=seed) for seed in range(200)]

    def product(x: Tensor) -> Tensor:
        with torch.no_grad():
            return amx.linear(x, weight, None)

    with ThreadPoolExecutor(4) as pool:
        for x, y in zip(inputs, pool.map(product, inputs), strict=True):
            assert_rounded(y, expected(x, weight, None))


def test_the_kernel_takes_as_many_threads_as_pytorch_was_told(kernel):
    """Also when it is called from a thread of Python's, which OpenMP gives its own numbers."""
    weight, x, threads = random(512, 256), random(8, 256), torch.get_num_threads()
    tasks = Path("/proc/self/task")

    def started() -> int:
        before = set(tasks.iterdir())
        with torch.no_grad():
            amx.linear(x, weight, None)
        return len(set(tasks.iterdir()) - before)

    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(started).result() == 0
    finally:
        torch.set_num_threads(threads)


def test_layers_use_the_kernel_and_see_weights_change(kernel):
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 20)).to(BF16), random(8, 64)
    with torch.inference_mode(), layers_for(model, 8):
        before = model[0](x)
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[0].bias.mul_(2)
        assert torch.equal(model[0](x), 2 * before)
        assert ("forward" in vars(model[1])) == (BF16 in _packable_dtypes())  # 20 outputs are not the kernel's


@pytest.fixture
def anew(monkeypatch, tmp_path, kernel):
    """An empty cache folder, and a process that has not looked for the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    amx._kernels.cache_clear()
    yield tmp_path
    amx._kernels.cache_clear()


def assert_packed_with_warning(caplog, text: str) -> None:
    layer, x = nn.Linear(64, 32).to(BF16), random(8, 64)
    with caplog.at_level(logging.WARNING), torch.inference_mode(), layers_for(layer, 8):
        assert_rounded(layer(x), expected(x, layer.weight, layer.bias))
    assert text in caplog.text
    assert len(caplog.records) == 1


def test_without_a_compiler_layers_are_packed_and_the_log_says_why(anew, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_packed_with_warning(caplog, "no-such-compiler")
    assert not [path for path in anew.rglob("*") if path.is_file()]


def test_of_what_a_compiler_says_the_log_shows_the_error(anew, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "g++ -nostdinc")
    assert_packed_with_warning(caplog, "immintrin.h")


def test_without_a_home_layers_are_packed(anew, monkeypatch, caplog):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert_packed_with_warning(caplog, "XDG_CACHE_HOME")


def test_a_damaged_library_is_compiled_anew(anew, caplog):
    layer = nn.Linear(64, 32).to(BF16)
    amx._library_path().parent.mkdir(parents=True)
    amx._library_path().write_bytes(b"")
    assert amx.suits(layer.weight)
    assert not caplog.records
