"""Quantizers of growing grids in tokenizers of one grid, by name; bits in ids, and their self-correction."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import labels, names, pixels, tiny
from torch import Tensor

import vistok
from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.pipelines import Pipeline
from vistok.quantizers.bsq import MultiScaleBSQ
from vistok.quantizers.scaled import PackedBSQ, ScaledQuantizer

SCALES = ((1, 1), (2, 3), (4, 6))
LENGTH = 31
NOT_OF_SCALES = {"dar", "flextok", "open_magvit2_video"}  # prefixes of ordered tokens, and clips
TAKING = [
    name
    for name in names("tokenizer")
    if "quantizer" in signature(registry.entry(name).load()).parameters and name not in NOT_OF_SCALES
]
KINDS = {"multi_scale": {"codebook_size": 16}, "multi_scale_bsq": {"entropy_temperature": 0.1}}


def maps(seed: int = 0, dim: int = 5) -> Tensor:
    return Keys.range(seed, 2).normal("x", dim, 4, 6)


def scales_of(name: str) -> tuple[tuple[int, int], ...]:
    """Three grids for a tiny tokenizer; the last one is its raster, or a row."""
    spec = tiny(name).spec
    last = spec.grid or (1, spec.length)
    return ((1, 1), (min(2, last[0]), 2), last)


# ---------------------------------------------------------------------------------------------------------------------
# Bits in ids


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 12), st.booleans())
def test_ids_are_the_bits_of_the_scales(seed, dim, decay):
    packed, plain, x = PackedBSQ(dim, SCALES, decay=decay), MultiScaleBSQ(dim, SCALES, decay=decay), maps(seed, dim)
    ids, bits = packed.encode(x), plain.encode(x)
    assert torch.equal((ids[..., None] >> torch.arange(dim)) & 1, bits)
    torch.testing.assert_close(packed.decode(ids), plain.decode(bits))
    torch.testing.assert_close(packed(x).quantized, plain(x).quantized)
    torch.testing.assert_close(packed.codes()[ids], packed.ids_to_latents(ids))
    inputs = ScaledQuantizer(packed).expander().expand(ids)
    torch.testing.assert_close(inputs, plain.next_inputs(bits))


def test_turned_bits_are_in_the_map_and_are_repaired():
    packed, x = PackedBSQ(5, SCALES, self_correction=0.3).train(), maps()
    draws = packed.training_draws(Keys.range(1, 2), 24)
    output = packed(x, draws=draws)
    torch.testing.assert_close(packed.decode(output.ids), output.quantized)
    assert not torch.equal(output.ids, packed.encode(x))
    strengths = packed.bits.drawn_strengths(draws, 0.3, 3)
    assert torch.equal(output.ids, packed.pack(packed.bits.self_correct(x, draws["flips"], strengths).flipped))
    with pytest.raises(ValueError, match="pass draws of training_draws"):
        packed(x)
    assert torch.equal(packed.eval()(x, draws=draws).ids, packed.encode(x))
    none = PackedBSQ(5, SCALES, self_correction=1.0, corrected_scales=0).train()
    assert torch.equal(none(x, draws=none.training_draws(Keys.range(1, 2), 24)).ids, none.encode(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"self_correction": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"corrected_scales": 4}, r"in 0\.\.3, got 4"),
        ({"dim": 0}, "1 to 62 bits"),
        ({"scales": ()}, "scales must be"),
        ({"scales": (0, 4)}, "at least 1"),
    ],
)
def test_bits_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedBSQ(**{"dim": 5, "scales": SCALES, **arguments})


# ---------------------------------------------------------------------------------------------------------------------
# In tokenizers, by name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TAKING)
def test_tokenizers_take_scales_by_name_and_feed_next_scale_generators(name, kind, tmp_path):
    scales = scales_of(name)
    model = tiny(name, quantizer={"name": kind, "scales": scales, **KINDS[kind]})
    images, length = pixels(model), sum(h * w for h, w in scales)
    assert (model.spec.length, model.spec.scales, model.spec.grid) == (length, scales, None)
    output = model.train()(images)
    assert output.tokens.shape == (3, length)
    assert set(output.losses) == set(model.loss_terms)
    pictured = output.reconstruction if model.reconstructs else output.features["quantized"]
    sum([pictured.square().mean(), *(term.mean() for term in output.losses.values())]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    ids = model.eval().encode(images)
    torch.testing.assert_close(model.dequantize(model.quantizer.of_maps.ids_to_latents(ids)), model.dequantize(ids))
    if model.renders:
        assert model.decode(ids[:, : model.spec.decodable(length - 1)]).shape == images.shape
        with pytest.raises(ValueError, match="end within a scale"):
            model.decode(ids[:, :2])
    assert torch.equal(model.quantize(model.encode_latents(images)), ids)
    with pytest.raises(ValueError, match="a sum of several"):
        model.codes()
    generator, condition = tiny("var", spec=model.spec), labels(0, 4, -1)
    drawn = generator.sample(condition, generator.options_type(temperature=0), tokenizer=model)
    assert torch.equal(generator.logits(drawn, condition, model).argmax(-1), drawn)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(vistok.load(tmp_path / "saved").encode(images), ids)


def test_a_pipeline_of_scales_by_name_previews_edits_and_smooths():
    tokenizer = tiny("vit_vqgan", quantizer={"name": "multi_scale_bsq", "scales": (1, 2, 4)})
    pipe, images = Pipeline(tokenizer, tiny("var", spec=tokenizer.spec)), pixels(tokenizer, batch=2)
    assert [preview.step for preview in pipe.stream([0, 1], seed=1)] == [1, 5, 21]
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :8] = True
    edited, kept = pipe.edit(images, mask, [0, 1]).tokens, tokenizer.encode(images)
    assert torch.equal(edited[:, 5:].view(2, 4, 4)[:, :, 2:], kept[:, 5:].view(2, 4, 4)[:, :, 2:])
    assert pipe([0, 1], seed=3, more_smooth=True).tokens.shape == (2, 21, 4)


@pytest.mark.parametrize(
    ("name", "scales", "message"),
    [
        ("llamagen_vq", (1, 2, 3), r"scales end at \(3, 3\), but there are 16 latents on a grid of \(4, 4\)"),
        ("vit_vqgan", ((1, 1), (2, 8)), r"end at \(2, 8\)"),
        ("titok", (1, 2), r"there are 8 latents in a row: end with \(1, their number\)"),
        ("robustok", (), "scales must be"),
    ],
)
def test_scales_that_do_not_end_at_the_latents_are_refused(name, scales, message):
    for kind, options in KINDS.items():
        with pytest.raises(ValueError, match=message):
            tiny(name, quantizer={"name": kind, "scales": scales, **options})


def test_other_sizes_than_the_scales_are_refused():
    model = tiny("llamagen_vq", quantizer={"name": "multi_scale_bsq", "scales": (1, 4)})
    with pytest.raises(ValueError, match=r"scales end at \(4, 4\), but there are 36 latents"):
        model.encode(torch.zeros(1, 3, 24, 24))
