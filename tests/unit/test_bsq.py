"""Bits on grids of growing size, and training on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.draws import Keys
from vistok.losses.bits import bit_accuracy, bit_cross_entropy
from vistok.quantizers.bsq import MultiScaleBSQ

SCALES = ((1, 1), (2, 3), (4, 6))


def latents(seed: int = 0, dim: int = 5) -> torch.Tensor:
    return Keys.range(seed, 2).normal("x", dim, 4, 6)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 9), st.booleans())
def test_bits_decode_to_what_was_quantized(seed, dim, decay):
    quantizer, x = MultiScaleBSQ(dim, SCALES, decay=decay), latents(seed, dim)
    output = quantizer(x)
    assert output.ids.shape == (2, 31, dim)
    assert set(output.ids.unique().tolist()) <= {0, 1}
    torch.testing.assert_close(quantizer.decode(output.ids), output.quantized)


def test_more_scales_are_nearer():
    x = latents()
    errors = [(x - level.so_far.squeeze(2)).square().mean().item() for level in MultiScaleBSQ(5, SCALES).levels(x)]
    assert errors == sorted(errors, reverse=True)


def test_zero_is_bit_0():
    assert MultiScaleBSQ(3, ((1, 1),)).encode(torch.zeros(1, 3, 1, 1)).tolist() == [[[0, 0, 0]]]


def test_flipped_bits_are_repaired_by_later_scales():
    quantizer, x = MultiScaleBSQ(5, SCALES), latents()
    clean = quantizer.self_correct(x, torch.ones(2, 31, 5), torch.zeros(3))
    assert torch.equal(clean.targets.long(), quantizer.encode(x))
    assert torch.equal(clean.flipped, clean.targets)
    torch.testing.assert_close(clean.inputs, quantizer.next_inputs(quantizer.encode(x)))
    turned = quantizer.self_correct(x, torch.zeros(2, 31, 5), torch.tensor([0.3, 0.0, 0.0]))
    assert torch.equal(turned.targets[:, 0], ~turned.flipped[:, 0])
    assert torch.equal(turned.targets[:, 1:], turned.flipped[:, 1:])
    seen, meant = (quantizer.decode(bits.long()) for bits in (turned.flipped, turned.targets))
    assert (x - seen).square().mean() < (x - meant).square().mean()  # what was met is what is to be decoded


def test_strengths_are_hundredths_of_one_draw_for_the_batch():
    quantizer = MultiScaleBSQ(2, SCALES)
    drawn = torch.stack(
        [quantizer.drawn_strengths(quantizer.correction_draws(Keys.range(s, 2)), 0.3, 2) for s in range(300)]
    )
    assert drawn.shape == (300, 3)
    assert set((drawn[:, :2] * 100).round().long().flatten().tolist()) == set(range(31))
    assert not drawn[:, 2].any()


def test_strengths_depend_on_no_sample():
    draws = [MultiScaleBSQ(2, SCALES).correction_draws(Keys.of(0, indices, step=4)) for indices in ([5, 7], [7, 9, 5])]
    assert (torch.cat([one["strengths"] for one in draws]) == draws[0]["strengths"][0]).all()
    assert torch.equal(draws[0]["flips"][1], draws[1]["flips"][0])
    other = MultiScaleBSQ(2, SCALES).correction_draws(Keys.of(0, [5], step=5))
    assert not torch.equal(other["strengths"][0], draws[0]["strengths"][0])


def test_neighbours_go_together_channels_first():
    quantizer, x = MultiScaleBSQ(3, ((2, 2), (4, 4))), Keys.range(0, 1).normal("x", 3, 4, 4)
    inputs = quantizer.next_inputs(quantizer.encode(x), patch=2)
    whole = quantizer.next_inputs(quantizer.encode(x)).transpose(1, 2).view(1, 3, 4, 4)
    expected = torch.nn.functional.pixel_unshuffle(whole, 2).flatten(2).transpose(1, 2)
    assert torch.equal(inputs, expected)
    with pytest.raises(ValueError, match="patches of 3 do not divide a grid of 4x4"):
        quantizer.next_inputs(quantizer.encode(x), patch=3)


def test_a_single_scale_has_bits_and_no_inputs():
    quantizer, x = MultiScaleBSQ(3, ((4, 4),)), Keys.range(0, 2).normal("x", 3, 4, 4)
    bits = quantizer.encode(x)
    assert torch.equal(bits, (x > 0).flatten(2).transpose(1, 2).long())
    assert quantizer.next_inputs(bits, patch=2).shape == (2, 0, 12)
    found = quantizer.self_correct(x, torch.ones(2, 16, 3), torch.zeros(1), patch=2)
    assert found.inputs.shape == (2, 0, 12)
    assert found.targets.shape == (2, 4, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiScaleBSQ(5, ()), "scales must be"),
        (lambda: MultiScaleBSQ(5, ((0, 2),)), "at least 1"),
        (lambda: MultiScaleBSQ(0, SCALES), "at least one bit"),
        (lambda: MultiScaleBSQ(5, ((1, 1), (4, 4)))(latents()), "the last scale must be the whole map"),
        (lambda: MultiScaleBSQ(4, SCALES)(latents()), "codes have 4 channels"),
        (lambda: MultiScaleBSQ(5, SCALES).decode(torch.zeros(1, 3, 5)), "whole scales"),
        (lambda: MultiScaleBSQ(5, SCALES).self_correct(latents(), torch.ones(2, 30, 5), torch.zeros(3)), "flips must"),
        (lambda: bit_cross_entropy(torch.zeros(1, 2, 5), torch.zeros(1, 2, 2)), "twice their width"),
        (lambda: bit_cross_entropy(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), ((1, 1),)), "hold 1 positions"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scales_weigh_by_the_inverse_root_of_their_area():
    logits, bits = torch.randn(2, 31, 10), (torch.rand(2, 31, 5) > 0.5).long()
    parts = [bit_cross_entropy(*(x.split((1, 6, 24), 1)[k] for x in (logits, bits))) for k in range(3)]
    roots = torch.tensor([1.0, 6.0, 24.0]).sqrt()
    expected = (torch.stack(parts) * roots).sum() / roots.sum()
    torch.testing.assert_close(bit_cross_entropy(logits, bits, SCALES), expected)
    assert bit_accuracy(logits, bits)[0] == (logits.view(2, 31, 5, 2).argmax(-1) == bits).float().mean()
