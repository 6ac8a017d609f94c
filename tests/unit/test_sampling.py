"""From logits to ids: truncation, inverse-CDF drawing."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import in_loop, labels, names, pixels, tiny
from torch import Tensor

from vistok.checkpoints import registry
from vistok.draws import Keys, first_above, inverse_cdf
from vistok.generators.engine.sampling import DecodingOptions, draw_ids, filter_logits

LOGIT = st.floats(-20, 20, width=32)
rows = st.lists(LOGIT, min_size=1, max_size=12).map(lambda row: torch.tensor([row]))
distinct_rows = st.lists(LOGIT, min_size=1, max_size=12, unique=True).map(lambda row: torch.tensor([row]))


def kept(filtered: Tensor) -> Tensor:
    return filtered > -torch.inf


@given(rows, st.integers(1, 15), st.floats(0.1, 4))
def test_top_k_keeps_the_k_likeliest_and_ties(logits, k, temperature):
    filtered = filter_logits(logits, temperature=temperature, top_k=k)
    scaled = logits / temperature
    larger = (scaled[:, None, :] > scaled[:, :, None]).sum(-1)  # how many ids are likelier than each
    assert torch.equal(kept(filtered), larger < k)
    assert torch.equal(filtered[kept(filtered)], scaled[kept(filtered)])


@given(distinct_rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_likeliest_set_that_reaches_p(logits, p):
    mask = kept(filter_logits(logits, top_p=p))[0]
    probabilities = logits.softmax(-1)[0]
    assert mask[logits.argmax()]
    if not mask.all():
        assert probabilities[mask].sum() >= p - 1e-5
        assert probabilities[~mask].max() <= probabilities[mask].min()
    if mask.sum() > 1:  # without its last member the set does not reach p
        assert probabilities[mask].sum() - probabilities[mask].min() < p + 1e-5


@given(rows, st.integers(0, 15), st.floats(0.01, 1))
def test_truncation_never_empties_a_row(logits, k, p):
    assert kept(filter_logits(logits, top_k=k, top_p=p)).any()


@given(rows)
def test_off_means_untouched(logits):
    assert torch.equal(filter_logits(logits), logits)


def test_filter_does_not_write_into_its_input():
    logits = torch.randn(2, 9)
    before = logits.clone()
    filter_logits(logits, top_k=2, top_p=0.5)
    assert torch.equal(logits, before)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_inverse_cdf_takes_the_first_id_above_the_uniform(weights, uniform):
    probabilities = torch.tensor([weights], dtype=torch.float32) / 64  # exact, and not summing to 1
    (chosen,) = inverse_cdf(probabilities, torch.tensor([uniform])).tolist()
    threshold = uniform * sum(weights)
    assert weights[chosen] > 0
    assert sum(weights[:chosen]) <= threshold + 1e-4
    assert sum(weights[: chosen + 1]) > threshold - 1e-4


def test_inverse_cdf_gives_every_id_its_share():
    probabilities = torch.tensor([0.5, 0.0, 0.125, 0.375]).expand(1000, 4)
    uniforms = (torch.arange(1000) + 0.5) / 1000
    assert torch.bincount(inverse_cdf(probabilities, uniforms), minlength=4).tolist() == [500, 0, 125, 375]


def test_largest_uniform_draws_the_last_possible_id():
    almost_one = torch.tensor([1 - 2**-24])
    assert inverse_cdf(torch.tensor([[0.3, 0.3, 0.3, 0.0]]), almost_one).tolist() == [2]
    assert inverse_cdf(torch.rand(1, 16384).softmax(-1), almost_one).item() > 16380


def test_rounding_of_a_parallel_sum_does_not_draw_an_excluded_id():
    # Accelerators sum in another order: the sum at an excluded id may exceed the one before it by a rounding error.
    sums, probabilities = torch.tensor([[0.5, 0.5 + 2**-20, 1 - 2**-20, 1.0]]), torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    sums = sums.masked_fill(probabilities == 0, 0)
    assert first_above(sums, torch.tensor([0.5 + 2**-21])).tolist() == [2]
    assert first_above(sums, torch.tensor([1 - 2**-24])).tolist() == [2]


@given(st.floats(1, 2, width=32))
def test_largest_uniform_stays_below_any_total(total):
    uniforms = torch.tensor([1 - 2**-24])  # times some totals it rounds to the total itself
    probabilities = torch.tensor([[total, 0.0]])
    assert inverse_cdf(probabilities, uniforms).tolist() == first_above(probabilities, uniforms).tolist() == [0]


@pytest.mark.parametrize("name", names("generator"))
def test_every_option_of_every_generator_is_finite(name):
    kind = registry.entry(name).load().options_type
    for field in fields(kind):
        for value in (math.nan, math.inf, -math.inf) if "float" in str(field.type) else ():
            with pytest.raises((ValueError, TypeError)):
                kind(**{field.name: value})


@pytest.mark.parametrize("name", ["mar", "xar", "maskgit", "ming_univision"])
def test_steps_have_a_bound(name):
    """More steps would run for days, or fill the memory with noise."""
    model = tiny(name)
    for count in (10**9, 10**30, 0, True):
        with pytest.raises(ValueError, match=r"num_(steps|iter) must be"):
            model.options_type(**{"num_iter" if name == "mar" else "num_steps": count}).times()


def test_options_of_later_sub_tokens_are_named():
    for name, value in {"later_temperature": -1, "later_top_k": -1, "later_top_p": 0}.items():
        with pytest.raises(ValueError, match=rf"{name} must"):
            tiny("open_magvit2_gpt").options_type(**{name: value})


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_greedy_in_three_ways(options):
    logits, uniforms = torch.randn(64, 11), torch.rand(64)
    assert torch.equal(draw_ids(logits, uniforms, DecodingOptions(**options)), logits.argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"guidance_scale": -0.5},
        {"guidance_scale": math.inf},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        DecodingOptions(**wrong)


HALVES = [torch.bfloat16, torch.float16]


def sampled(model, **options):
    settings = model.options_type(**options)
    draws = model.sampling_draws(Keys.range(0, 2), settings)
    tokenizers = {name: tokenizer.to(model.dtype) for name, tokenizer in in_loop(model).items()}
    return model.sample(labels(0, 1), settings, draws=draws, **tokenizers)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", sorted({*names("generator")} - {"mar"}))  # whose tiny one exceeds float16, see below
def test_every_generator_samples_in_half_precision(name, dtype):
    tokens = sampled(tiny(name).to(dtype))
    assert not tokens.is_floating_point() or tokens.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", names("tokenizer"))
def test_every_tokenizer_decodes_in_half_precision(name, dtype):
    tokenizer = tiny(name).to(dtype)
    tokens = tokenizer.encode(pixels(tokenizer).to(dtype))
    if not tokenizer.embeds:
        assert tokenizer.decode(tokens).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}])
@pytest.mark.parametrize("name", names("generator"))
@pytest.mark.parametrize("how", ["overflow", "nan"])
def test_no_generator_makes_tokens_of_numbers_that_are_not_finite(name, how, options):
    """No ids or latents are returned, drawn or greedy."""
    model = tiny(name)
    if not hasattr(model.options_type(), "temperature"):
        options = {}
    parameters = list(model.parameters())
    with torch.no_grad():
        if how == "nan":
            parameters[-1].fill_(math.nan)
        else:
            model.half()
            for parameter in model.parameters():
                parameter.mul_(300 if parameter.ndim > 1 else 1)
    with pytest.raises(ValueError, match=r"the (logits|latents) of token \d+ are not finite in float(16|32): "):
        sampled(model, **options)
