"""Speculative Jacobi decoding: lossless for every row of every batch, with fewer passes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import labels, single_token_generators, tiny
from torch import Tensor

from vistok.draws import Keys, inverse_cdf
from vistok.generators.engine.decodings.jacobi import gumbel, settled, verify
from vistok.generators.engine.sampling import DecodingOptions, filter_logits
from vistok.generators.llama import Llama
from vistok.types import Condition, TokenSpec

LENGTH, SYMBOLS, RUNS = 5, 4, 8000


@pytest.fixture(scope="module")
def chain() -> Llama:
    """A model of 5 tokens of 4 symbols, all of whose 1,024 outcomes can be listed."""
    model = tiny("llama", spec=TokenSpec(LENGTH, SYMBOLS, dim=4, grid=(1, LENGTH)), num_classes=2)
    with torch.no_grad():
        model.output.weight.normal_(std=0.4, generator=torch.Generator().manual_seed(1))
        model.token_embedding.weight.mul_(30)
    return model


def outcomes() -> Tensor:
    return torch.cartesian_prod(*[torch.arange(SYMBOLS)] * LENGTH)


@torch.no_grad()
def joint(model: Llama, options: DecodingOptions) -> Tensor:
    """The probability of every outcome, by teacher forcing."""
    ids = outcomes()
    condition = Condition.from_labels(torch.zeros(len(ids), dtype=torch.int64))
    logits = model.logits(ids, condition)
    if options.guidance.is_on:
        null, scale = model.logits(ids, condition.null()), options.guidance.weights(0, 1)[0]
        logits = null + scale * (logits - null)
    logits = filter_logits(logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    return logits.softmax(-1).gather(2, ids[..., None]).squeeze(2).prod(1)


def z_of_chi_square(counts: Tensor, expected: Tensor) -> float:
    """Chi-square over cells with an expectation above 5, the others together, in deviations from its mean."""
    large = expected > 5
    rest = torch.stack([counts[~large].sum(), expected[~large].sum()])
    counts, expected = counts[large].double(), expected[large].double()
    chi = ((counts - expected).square() / expected).sum()
    if rest[1] > 5:
        chi = chi + (rest[0] - rest[1]).square() / rest[1]
    freedom = large.sum() - (0 if rest[1] > 5 else 1)
    return float((chi - freedom) / math.sqrt(2 * freedom))


SETTINGS = {
    "random": {},
    "coupled": {"coupled": True},
    "exact": {"criterion": "exact"},
    "left": {"draft": "repeat_left"},
    "left, coupled": {"draft": "repeat_left", "coupled": True},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.8, "coupled": True},
    "guided": {"guidance_scale": 2.0},
    "guided, coupled": {"guidance_scale": 2.0, "coupled": True, "temperature": 1.3},
    "window 1": {"window": 1},
    "window 2": {"window": 2, "coupled": True},
    "window 3": {"window": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_samples_follow_the_distribution_of_the_model(chain, settings):
    options = DecodingOptions(decoding="jacobi", **{"window": 4, **settings})
    condition = Condition.from_labels(torch.zeros(RUNS, dtype=torch.int64))
    ids = chain.sample(condition, options, draws=chain.sampling_draws(Keys.range(5, RUNS), options))
    cells = (ids * SYMBOLS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    counts, expected = torch.bincount(cells, minlength=SYMBOLS**LENGTH), joint(chain, options) * RUNS
    assert abs(z_of_chi_square(counts, expected)) < 4
    assert not counts[expected == 0].any()


def passes(model, condition, options, draws) -> tuple[Tensor, int]:
    """Ids, and how many passes they took."""
    calls = []
    handle = model.norm.register_forward_hook(lambda *_: calls.append(1))
    try:
        return model.sample(condition, options, draws=draws), len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("draft", ["random", "repeat_left", "repeat_above"])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize(("name", "arguments"), single_token_generators().items())
def test_the_likeliest_ids_are_those_of_plain_decoding(name, arguments, window, draft):
    model, condition = tiny(name, **arguments), labels(0, 4, 2, 1)
    options = DecodingOptions(temperature=0, guidance_scale=(1.0, 3.0), decoding="jacobi", window=window, draft=draft)
    expected = model.sample(condition, DecodingOptions(temperature=0, guidance_scale=(1.0, 3.0)))
    ids, count = passes(model, condition, options, None)
    assert torch.equal(ids, expected)
    assert count <= model.spec.length + 1


@pytest.mark.parametrize(("name", "arguments"), single_token_generators().items())
def test_exact_agreement_gives_the_ids_of_plain_decoding(name, arguments):
    model, condition = tiny(name, **arguments), labels(0, 4, 2, 1)
    options = {"guidance_scale": 2.0, "top_k": 9}
    plain, exact = DecodingOptions(**options), DecodingOptions(decoding="jacobi", criterion="exact", **options)
    draws = model.sampling_draws(Keys.range(3, 4), exact)
    assert torch.equal(draws["ids"], model.sampling_draws(Keys.range(3, 4), plain)["ids"])
    ids, count = passes(model, condition, exact, draws)
    assert torch.equal(ids, model.sample(condition, plain, draws=draws))
    assert count <= model.spec.length


@pytest.mark.parametrize("coupled", [False, True])
def test_a_seed_gives_the_same_sample_in_any_batch(coupled):
    model, chosen = tiny("llama"), [3, 0, 7, 4]
    options = DecodingOptions(decoding="jacobi", window=6, coupled=coupled, guidance_scale=2.0)

    def sample(indices: list[int]) -> Tensor:
        draws = model.sampling_draws(Keys.of(1, indices), options)
        return model.sample(Condition.from_labels(torch.tensor(indices) % 5), options, draws=draws)

    together = sample(chosen)
    assert torch.equal(torch.cat([sample([index]) for index in chosen]), together)
    assert torch.equal(sample(chosen[::-1]), together.flip(0))


def test_chunks_hold_every_token_once_though_rows_commit_unevenly():
    model, condition = tiny("llama"), labels(0, 4, 2)
    options = DecodingOptions(decoding="jacobi", window=8, coupled=True)
    draws = model.sampling_draws(Keys.range(0, 3), options)
    chunks = list(model.stream(condition, options, draws=draws))
    seen, ids = torch.zeros(3, 16, dtype=torch.int64), torch.zeros(3, 16, dtype=torch.int64)
    uneven = False
    for chunk in chunks:
        counts = chunk.valid.sum(1)
        uneven |= len(counts.unique()) > 1
        rows, columns = chunk.valid.nonzero(as_tuple=True)
        places = chunk.positions[rows, columns]
        seen[rows, places] += 1
        ids[rows, places] = chunk.tokens[rows, columns]
    assert (seen == 1).all()
    assert uneven
    assert len(chunks) < 16
    assert torch.equal(ids, model.sample(condition, options, draws=draws))


@pytest.mark.parametrize(("name", "arguments"), single_token_generators().items())
def test_parts_forced_tokens_and_prefixes(name, arguments):
    model, condition = tiny(name, **arguments), labels(0, 4, 2)
    options = DecodingOptions(temperature=0, decoding="jacobi", window=5)
    whole = model.sample(condition, options)
    session = model.start(condition, options)
    session.append(whole[:, :3])
    list(session.generate(6))
    assert torch.equal(session.tokens, whole[:, :9])
    session.append(whole[:, 9:11])
    list(session.generate())
    assert torch.equal(session.tokens, whole)
    where = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    plain, jacobi = (model.start(condition, DecodingOptions(temperature=0, decoding=d)) for d in ("plain", "jacobi"))
    for one in (plain, jacobi):
        one.force(torch.full((3, 16), 7), where)
        list(one.generate())
    assert torch.equal(plain.tokens, jacobi.tokens)
    assert (jacobi.tokens[where] == 7).all()


def test_coupled_drafts_are_accepted_more_often():
    model, condition = tiny("llama", spec=TokenSpec(64, 32, dim=4, grid=(8, 8))), labels(*range(4))
    counts = {}
    for coupled in (False, True):
        options = DecodingOptions(decoding="jacobi", coupled=coupled, top_k=8)
        draws = model.sampling_draws(Keys.range(0, 4), options)
        counts[coupled] = passes(model, condition, options, draws)[1]
    assert counts[True] < counts[False] < 64


def test_logits_that_are_not_finite_are_an_error():
    model, options = tiny("llama"), DecodingOptions(decoding="jacobi")
    with torch.no_grad():
        model.output.weight[0] = torch.nan
    draws = model.sampling_draws(Keys.range(0, 2), options)
    with pytest.raises(ValueError, match="logits of token 0 are not finite"):
        model.sample(labels(0, 1), options, draws=draws)


# ---------------------------------------------------------------------------------------------------------------------
# The test of drafts


def distributions(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SYMBOLS, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_drafts_from_the_target_itself_are_all_accepted_and_impossible_ones_never():
    target, drafts = distributions(50), torch.randint(SYMBOLS, (50, 3))
    q = torch.cat([target[:, :1], target[:, :-1]], 1)
    assert (verify(drafts, q, target, torch.full((50, 3), 1 - 2**-24)).matched == 3).all()
    impossible = target.scatter(2, drafts.roll(-1, 1)[..., None], 0)
    impossible = impossible / impossible.sum(2, keepdim=True)
    verdict = verify(drafts, q, impossible, torch.zeros(50, 3))
    assert (verdict.matched == 1).all()
    torch.testing.assert_close(verdict.residual.sum(1), torch.ones(50))


def test_every_row_commits_on_its_own_and_keeps_its_distribution():
    # If all rows commit as few tokens as the slowest row, accepted drafts are tested twice: .668, .313, .019 here.
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    drafts = torch.stack([torch.zeros(count).long(), torch.multinomial(q, count, True, generator=generator)], 1)
    probs, target = q.expand(count, 2, 3), p.expand(count, 2, 3)
    verdict = verify(drafts, probs, target, torch.rand(count, 2, generator=generator))
    again = inverse_cdf(verdict.residual, torch.rand(count, generator=generator)).clamp_max(2)
    first = torch.where(verdict.matched > 1, drafts[:, 1], again)
    torch.testing.assert_close(torch.bincount(first) / count, p, atol=0.005, rtol=0)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_settled_tokens_are_drafts_then_one_and_then_new_drafts(matched, seed):
    generator = torch.Generator().manual_seed(seed)
    drafts, drawn = (torch.randint(50, (1, 6), generator=generator) for _ in range(2))
    tokens = settled(drafts, drawn, torch.tensor([matched]), torch.tensor([99]))[0].tolist()
    assert tokens == [*drafts[0, 1:matched].tolist(), 99, *drawn[0, matched:].tolist()]


def test_noise_is_gumbel_and_belongs_to_its_number():
    numbers = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    noise = gumbel(numbers, 500)
    assert torch.equal(gumbel(numbers.flip(0), 500), noise.flip(0))
    uniform = (-(-noise).exp()).exp().flatten().sort().values
    assert (uniform - torch.linspace(0, 1, len(uniform))).abs().max() < 0.01
    rows = noise.flatten(0, 1)
    assert (torch.corrcoef(rows) - torch.eye(200)).abs().max() < 0.3
    assert (torch.corrcoef(rows.T) - torch.eye(500)).abs().mean() < 0.07


def test_settings_that_do_not_fit_are_refused():
    for wrong in ({"window": 0}, {"draft": "below"}, {"criterion": "lax"}, {"decoding": "beam"}):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            DecodingOptions(**wrong)
    with pytest.raises(ValueError, match="4 in a step, independent of each other: take decoding 'plain'"):
        tiny("token_shuffle").sample(labels(0), DecodingOptions(temperature=0, decoding="jacobi"))
    model = tiny("llama", spec=TokenSpec(8, 32, dim=4), positions="rope1d")
    with pytest.raises(ValueError, match=r"no raster: take draft .random"):
        model.sample(labels(0), DecodingOptions(temperature=0, decoding="jacobi", draft="repeat_left"))
