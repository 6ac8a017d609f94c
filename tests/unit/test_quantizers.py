"""Quantizers: nearest codes, gradients, residual levels, restart of dead codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.quantizers import ResidualQuantizer, VectorQuantizer


def latents(seed=0, n=64, dim=4):
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), normalize=st.booleans(), dim=st.integers(1, 6))
def test_codes_come_back_as_themselves(seed, normalize, dim):
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(16, dim, normalize=normalize)
    if normalize and dim == 1:
        return  # all one-dimensional unit vectors are +-1: ids are not unique
    ids = torch.arange(16)[None]
    codes = quantizer.ids_to_latents(ids).detach()
    others = torch.cdist(codes, codes) + torch.eye(16) * 9
    apart = others.amin(-1) > 1e-2  # distances are rounded: of two codes that nearly coincide either may be chosen
    assert torch.equal(quantizer.encode(codes)[apart], ids[apart])
    assert torch.equal(quantizer.neighbours(codes, 3)[..., 0][apart], ids[apart])
    quantized = quantizer(codes).quantized
    assert torch.allclose(quantized[apart], codes[apart], atol=1e-6)
    assert torch.allclose(quantized, codes, atol=1e-2)


@pytest.mark.parametrize("gradient", ["raw", "normalised"])
def test_straight_through_gradient(gradient):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, gradient=gradient)
    z = latents().requires_grad_()
    weight = latents(seed=1)
    (quantizer(z).quantized * weight).sum().backward()
    carrier = latents().requires_grad_()
    through = carrier if gradient == "raw" else torch.nn.functional.normalize(carrier, dim=-1)
    (through * weight).sum().backward()
    assert torch.allclose(z.grad, carrier.grad, atol=1e-6)
    assert quantizer.embedding.weight.grad is None


def test_more_residual_levels_come_closer():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(VectorQuantizer(64, 4, normalize=False), 4)
    with torch.no_grad():
        quantizer.quantizer.embedding.weight.mul_(0.5)
        quantizer.quantizer.embedding.weight[0] = 0  # a level that cannot help may do nothing
    z = latents()
    ids = quantizer.encode(z)
    errors = [(quantizer.ids_to_latents(ids[..., :n]) - z).square().mean() for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(quantizer(z).ids, ids)


def test_restart_revives_the_codebook():
    torch.manual_seed(0)
    # All latents lie in one corner, where almost no code of the initial codebook is nearest.
    z = latents() * 0.05 + torch.tensor([3.0, 1.0, 0.0, 0.0])
    collapsed, revived = (VectorQuantizer(64, 4, restart_after=n).train() for n in (0, 5))
    for _ in range(20):
        for quantizer in (collapsed, revived):
            quantizer(z)
            quantizer.restart_dead_codes()
    assert (collapsed(z).usage() > 0).sum() < 10
    assert (revived(z).usage() > 0).sum() > 30


def test_restart_leaves_codes_in_use_alone():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, normalize=False, restart_after=2).train()
    used = quantizer.encode(latents()).unique()
    before = quantizer.embedding.weight.detach().clone()
    for _ in range(5):
        quantizer(latents())
        quantizer.restart_dead_codes()
    assert torch.equal(quantizer.embedding.weight[used], before[used])


def test_dead_codes_move_onto_latents_once_gradients_are_there():
    torch.manual_seed(1)
    quantizer = VectorQuantizer(64, 4, restart_after=1).train()
    before = quantizer.embedding.weight.detach().clone()
    used = quantizer(latents()).ids.unique()
    assert torch.equal(quantizer.embedding.weight, before)  # which the backward pass still needs
    quantizer.restart_dead_codes()
    moved = (quantizer.embedding.weight != before).any(-1)
    assert not moved[used].any()
    assert moved.sum() == 64 - len(used)
    assert (quantizer.embedding.weight[moved, None] == latents().flatten(0, 1)).all(-1).any(1).all()
    after = quantizer.embedding.weight.detach().clone()
    quantizer.restart_dead_codes()
    assert torch.equal(quantizer.embedding.weight, after)


def test_no_restart_in_evaluation():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, restart_after=1).eval()
    before = quantizer.embedding.weight.detach().clone()
    quantizer(latents())
    quantizer.restart_dead_codes()
    assert torch.equal(quantizer.embedding.weight, before)


def test_entropy_is_offered_only_if_asked_for():
    assert VectorQuantizer(8, 4).loss_terms == ("codebook", "commitment")
    quantizer = VectorQuantizer(8, 4, entropy_temperature=0.1)
    assert set(quantizer(latents()).losses) == set(quantizer.loss_terms) == {"codebook", "commitment", "entropy"}
