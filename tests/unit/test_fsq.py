"""Finite scalar quantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.quantizers import FSQ

LEVELS = st.lists(st.integers(2, 8), min_size=1, max_size=4)


@given(LEVELS)
def test_ids_and_codes_are_inverse_over_the_whole_codebook(levels):
    quantizer = FSQ(levels)
    ids = torch.arange(quantizer.codebook_size)
    codes = quantizer.ids_to_latents(ids)
    assert torch.equal(quantizer.latents_to_ids(codes), ids)
    assert len(codes.unique(dim=0)) == len(ids)
    assert codes.abs().max() <= 1


@given(LEVELS, st.integers(0, 1000))
@settings(max_examples=30)
def test_encoding_is_the_nearest_code(levels, seed):
    quantizer = FSQ(levels)
    latents = 2 * torch.randn(16, len(levels), generator=torch.Generator().manual_seed(seed))
    ids = quantizer.encode(latents)
    assert torch.equal(quantizer(latents[None]).ids[0], ids)
    k = min(5, quantizer.codebook_size)
    near = quantizer.neighbours(latents, k)
    assert torch.equal(near[:, 0], ids)
    table = quantizer.ids_to_latents(torch.arange(quantizer.codebook_size))
    distances = torch.cdist(quantizer.continuous(latents), table)
    torch.testing.assert_close(distances.gather(1, near), distances.topk(k, largest=False).values, rtol=1e-4, atol=1e-4)


def test_rounding_passes_the_gradient_of_the_bound():
    quantizer = FSQ([8, 5])
    latents = torch.randn(1, 6, 2, requires_grad=True)
    (through,) = torch.autograd.grad(quantizer(latents).quantized.sum(), latents)
    (bound,) = torch.autograd.grad(quantizer.continuous(latents).sum(), latents)
    torch.testing.assert_close(through, bound)


def test_outermost_levels_can_be_reached():
    quantizer = FSQ([8, 5])
    ends = quantizer.ids_to_latents(quantizer.encode(torch.tensor([[-9.0, -9.0], [9.0, 9.0]])))
    torch.testing.assert_close(ends, torch.tensor([[-1.0, -1.0], [0.75, 1.0]]))


@pytest.mark.parametrize("levels", [[], [1, 5]])
def test_levels_that_code_nothing_are_refused(levels):
    with pytest.raises(ValueError, match="at least 2 levels"):
        FSQ(levels)


@pytest.mark.parametrize("k", [0, 41])
def test_more_neighbours_than_codes_are_refused(k):
    with pytest.raises(ValueError, match=f"1..40, the number of codes; got {k}"):
        FSQ([8, 5]).neighbours(torch.zeros(1, 2), k)
