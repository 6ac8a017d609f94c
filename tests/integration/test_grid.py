"""Any tokenizer feeds any generator that fits; any loss works with any tokenizer that provides its inputs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from support.grid import (
    REFUSALS,
    TOKENIZERS,
    Pair,
    all_pairs,
    decoding_refusal,
    in_readme,
    reason,
    table,
    tokenizer,
    train_two_steps,
)
from support.tiny_models import in_loop, labels, names, tiny, token_ids

from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.generators.engine.continuous import ContinuousGenerator
from vistok.generators.engine.decodings import DECODINGS
from vistok.signatures import ConfigError
from vistok.train.tasks.objective import TERMS, check_terms

pytestmark = pytest.mark.slow

DISCRETE = [name for name in names("generator") if tiny(name).spec.discrete]


@pytest.fixture(scope="module")
def pairs() -> dict[str, dict[str, Pair]]:
    return all_pairs()


def test_every_pair_trains_or_is_refused_for_a_reason_that_holds(pairs):
    for label, of in pairs.items():
        spec = tokenizer(label).spec
        for name, pair in of.items():
            continuous = issubclass(registry.entry(name).load(), ContinuousGenerator)
            if pair.refusal is None:
                assert spec.discrete != continuous, (label, name)
                assert all(math.isfinite(loss) for loss in pair.losses), (label, name)
                assert pair.losses[1] != pair.losses[0], (label, name)
            else:
                assert REFUSALS[reason(pair)][1](spec, continuous), (label, name, pair.refusal)


def test_every_discrete_tokenizer_has_generators_and_so_has_every_continuous_one(pairs):
    for label, of in pairs.items():
        if tokenizer(label).spec.depth == 1:
            assert [name for name, pair in of.items() if pair.refusal is None], label


def test_the_readme_has_this_table(pairs):
    assert in_readme() == table(pairs), "run python tests/support/grid.py"


@pytest.mark.parametrize("label", TOKENIZERS)
def test_every_loss_is_taken_by_the_tokenizers_that_give_what_it_reads(label):
    model = tokenizer(label)
    for name, term in TERMS.items():
        if term.fits(model):
            try:
                assert name in check_terms(model, {name: 1.0})
            except ConfigError as error:  # one of its settings has no default, or another tokenizer's
                assert re.match(rf"losses\.{name}[.:]", str(error)), error  # noqa: PT017
        else:
            with pytest.raises(ConfigError, match="provides no such term"):
                check_terms(model, {name: 1.0})
    if not model.reconstructs:
        assert not [name for name in ("l1", "l2", "lpips") if TERMS[name].fits(model)]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("name", DISCRETE)
def test_every_generator_of_ids_trains_and_samples_with_every_decoding_or_says_why_not(name, decoding):
    model, refusal = tiny(name).train(), decoding_refusal(tiny(name), decoding)
    assert all(map(math.isfinite, train_two_steps(model, token_ids(model), in_loop(model))))
    model.eval()

    def sample() -> torch.Tensor:
        options = model.options_type(**({} if decoding == "plain" else {"decoding": decoding}))
        draws = model.sampling_draws(Keys.range(0, 2), options)
        return model.sample(labels(0, 1), options, draws=draws, **in_loop(model))

    if refusal is None:
        assert sample().shape == (2, model.spec.length)
    else:
        with pytest.raises((ValueError, TypeError), match=refusal):
            sample()
