"""Cautious sampling: the best of several continuations if the model is unsure, else plain sampling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.tiny_models import labels, single_token_generators, tiny

from vistok.draws import Keys
from vistok.generators.engine.decodings import cautious
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.types import TokenSpec

SURE = math.log(32) - 1e-3
"""Nearly the entropy of equally likely ids, so it is never exceeded."""
PLAIN = DecodingOptions(temperature=1.0)
ALWAYS = DecodingOptions(decoding="cautious", entropy_threshold=0.0, trials=3)


def sample(model, condition, options, keys=None):
    draws = model.sampling_draws(keys or Keys.range(0, len(condition)), options)
    return model.sample(condition, options, draws=draws)


@pytest.fixture(scope="module", params=["llama", "vit_vqgan_gpt", "ibq_gpt"])
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("changes", [{"entropy_threshold": SURE}, {"entropy_threshold": 0.0, "trials": 1}])
def test_where_nothing_is_tried_it_is_plain_sampling_to_the_bit(model, changes):
    condition = labels(0, 1, 2)
    assert torch.equal(sample(model, condition, replace(ALWAYS, **changes)), sample(model, condition, PLAIN))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_of_each_row_the_likeliest_continuation_is_kept(model, scale):
    """Against a textbook loop that feeds whole prefixes anew and scores every continuation."""
    condition, options = labels(3), replace(ALWAYS, guidance_scale=scale)
    draws = model.sampling_draws(Keys.range(0, 1), options)
    numbers = torch.cat([draws["ids"][..., None], draws["trials"]], 2)[0]  # (L, trials)
    kept = torch.zeros(1, 0, dtype=torch.int64)
    for row in range(4):
        found = []
        for trial in range(3):
            ids, likelihood = kept, 0.0
            for place in range(4 * row, 4 * row + 4):
                logits = guided(model, ids, condition, scale)
                drawn = draw_ids(logits, numbers[place, trial].view(1), PLAIN)
                likelihood += float(logits.log_softmax(-1)[0, drawn])
                ids = torch.cat([ids, drawn[:, None]], 1)
            found.append((likelihood, ids))
        kept = max(found, key=lambda each: each[0])[1]
    assert torch.equal(model.sample(condition, options, draws=draws), kept)


@torch.no_grad()
def guided(model, ids, condition, scale):
    padded = torch.cat([ids, torch.zeros(1, 16 - ids.shape[1], dtype=torch.int64)], 1)
    own, null = (model.logits(padded, part)[:, ids.shape[1]] for part in (condition, condition.drop(torch.ones(1) > 0)))
    return own if scale == 1 else null + scale * (own - null)


def test_rows_are_tried_by_themselves():
    model = tiny("llama")
    threshold = float(
        cautious._entropy(model.logits(torch.zeros(3, 16, dtype=torch.int64), labels(0, 1, 2))[:, 0]).sort()[0][1]
    )
    options = replace(ALWAYS, entropy_threshold=threshold - 1e-4)
    together = sample(model, labels(0, 1, 2), options)
    for row in range(3):
        alone = sample(model, labels(row), options, Keys.range(0, 1, start=row))
        assert torch.equal(together[row : row + 1], alone)


def test_prefixes_continuations_and_forced_ids_go_along():
    model = tiny("llama")
    options, prefix = replace(ALWAYS, trial_length=3), torch.tensor([[5, 6], [7, 8]])
    draws = model.sampling_draws(Keys.range(0, 2), options)
    session = model.start(labels(0, 1), options, draws=draws)
    session.append(prefix)
    where = torch.zeros(2, 16, dtype=torch.bool)
    where[:, 9] = True
    session.force(torch.full((2, 16), 4), where)
    chunks = list(session.generate(5)) + list(session.generate())
    assert torch.equal(session.tokens[:, :2], prefix)
    assert session.tokens[:, 9].tolist() == [4, 4]
    streamed = torch.cat([chunk.tokens for chunk in chunks], 1)
    assert torch.equal(torch.cat([prefix, streamed], 1), session.tokens)
    session.tokens.float().requires_grad_()  # no inference tensors: callers may train on them


@pytest.mark.parametrize("name", sorted(single_token_generators()))
def test_every_generator_of_single_tokens_takes_it(name):
    model = tiny(name, **single_token_generators()[name])
    options = model.options_type(decoding="cautious", entropy_threshold=0.0, trials=2, trial_length=8)
    tokens = sample(model, labels(0, 1), options)
    assert tokens.shape == (2, model.spec.length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_threshold": -1.0}, "entropy_threshold must be 0 or more nats"),
        ({"entropy_threshold": 4.0}, r"entropy_threshold must be below 3\.466"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"trial_length": -1}, "trial_length 0"),
        ({"temperature": 0.0}, "at temperature 0 all are alike"),
    ],
)
def test_bad_options_are_named(options, message):
    model = tiny("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        sample(model, labels(0), replace(ALWAYS, **options))


def test_models_of_windows_and_plain_sequences_say_what_they_lack():
    with pytest.raises(ValueError, match="decoding 'plain'"):
        sample(tiny("token_shuffle"), labels(0), tiny("token_shuffle").options_type(decoding="cautious"))
    model = tiny("llama", spec=TokenSpec(16, 32, dim=4), positions="rope1d")
    with pytest.raises(ValueError, match="lie on none: give a number of tokens"):
        sample(model, labels(0), ALWAYS)
