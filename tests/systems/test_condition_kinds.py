"""Every generator with every kind of condition: it trains two steps and samples, or refuses with its reason."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import in_loop, names, tiny, token_ids

from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.generators.base import Generator
from vistok.types import Condition, ConditionSpec, FeatureSpec, IdSpec

SPECS = {
    "nothing": ConditionSpec(),
    "labels": ConditionSpec(num_classes=5),
    "ids": ConditionSpec(ids=IdSpec(9, 3)),
    "features": ConditionSpec(features=FeatureSpec(6, 3)),
    "given": ConditionSpec(given=IdSpec(32, 4)),
    "given latents": ConditionSpec(given=FeatureSpec(4, 4)),
    "labels and ids": ConditionSpec(num_classes=5, ids=IdSpec(9, 3)),
    "labels and features": ConditionSpec(num_classes=5, features=FeatureSpec(6, 3)),
    "labels and given": ConditionSpec(num_classes=5, given=IdSpec(32, 4)),
    "ids and features": ConditionSpec(ids=IdSpec(9, 3), features=FeatureSpec(6, 3)),
    "ids and given latents": ConditionSpec(ids=IdSpec(9, 3), given=FeatureSpec(4, 4)),
    "labels, ids, features and given": ConditionSpec(5, IdSpec(9, 3), FeatureSpec(6, 3), IdSpec(32, 4)),
}
BATCH = 3


def condition_of(spec: ConditionSpec) -> Condition:
    """Random values of every part; the last row is left-padded, and among texts the first is empty."""
    mask = torch.ones(BATCH, 3, dtype=torch.bool)
    mask[-1, 0] = False
    first = torch.arange(BATCH) == 0
    given = spec.given
    conditions = {
        "labels": lambda: Condition.from_labels(torch.arange(BATCH)),
        "ids": lambda: Condition.from_ids(torch.randint(9, (BATCH, 3)), mask).drop(first),
        "features": lambda: Condition.from_features(torch.randn(BATCH, 3, 6), mask).drop(first),
        "given": lambda: Condition.from_given(
            torch.randn(BATCH, 4, 4) if isinstance(given, FeatureSpec) else torch.randint(32, (BATCH, 4))
        ),
    }
    return Condition.together(*(conditions[part]() for part in spec.parts)) if spec.parts else Condition.none(BATCH)


def refusal(model_class: type[Generator], spec: ConditionSpec) -> str | None:
    """Why a generator cannot take this condition; None if it can."""
    try:
        model_class.condition_arguments(spec)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", names("generator"))
def test_it_trains_and_samples_or_says_why_not(name, kind):
    spec, model_class = SPECS[kind], registry.entry(name).load()
    reason = refusal(model_class, spec)
    if reason is not None:
        assert kind not in ("nothing", "labels")
        assert reason.startswith(f"{name} takes ")
        return
    arguments = model_class.condition_arguments(spec)
    torch.manual_seed(0)
    model = tiny(name, **arguments).train()
    assert model.condition_spec.only(spec.parts) == spec
    condition = model.condition_spec.check(condition_of(spec))
    loop = in_loop(model)
    tokens = token_ids(model) if model.spec.discrete else torch.randn(BATCH, model.spec.length, model.spec.dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        loss = model(tokens, condition, draws=model.training_draws(Keys.range(0, BATCH, step)), **loop).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    model.eval()
    draws = model.sampling_draws(Keys.range(0, BATCH), model.options_type())
    sampled = model.sample(condition, draws=draws, **loop)
    assert sampled.shape == tokens.shape


@pytest.mark.parametrize("name", names("generator"))
def test_without_condition_dropout_there_is_no_null_condition(name):
    model = tiny(name, condition_dropout=0.0)
    assert not model.has_null
    scales = {key: 1.0 for key in ("guidance_scale", "image_guidance_scale") if hasattr(model.options_type, key)}
    plain, guided = model.options_type(**scales), model.options_type(**scales | {"guidance_scale": 2.0})
    draws, rest = model.sampling_draws(Keys.range(0, 2), plain), in_loop(model)
    model.start(Condition.from_labels([0, 4]), plain, draws=draws, **rest)
    with pytest.raises(ValueError, match="without a null condition"):
        model.start(Condition.from_labels([0, 4]), guided, draws=draws, **rest)
    with pytest.raises(ValueError, match="without a null condition"):
        model.start(Condition.none(2), plain, draws=draws, **rest)
    assert tiny(name, condition_dropout=0.1).has_null
    nothing = type(model).condition_arguments(ConditionSpec())
    assert tiny(name, condition_dropout=0.0, **nothing).has_null  # it has no other condition


def test_captions_have_a_null_condition_only_with_condition_dropout():
    captions = {"num_classes": 0, "caption_dim": 6, "caption_length": 3}
    assert tiny("llama", **captions).has_null
    assert not tiny("llama", condition_dropout=0.0, **captions).has_null
