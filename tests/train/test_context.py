"""Training contexts in place of the data, the model's own tokens or random ones, for every generator."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.tiny_models import draws_parts, in_loop, labels, names, tiny, token_ids

from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.train.tasks.generator import GeneratorLearner
from vistok.train.tasks.prediction import PredictionConfig, PredictionObjective, ScheduledSampling
from vistok.types import Clock, TokenSpec

ALL = names("generator")
WHOLE_IDS = [
    name
    for name in ALL
    if issubclass(kind := registry.entry(name).load(), AutoregressiveGenerator)
    and not draws_parts(kind)  # see test_prediction.py
    and name != "token_shuffle"  # which also learns a text
]
CLASSES, KEYS = labels(0, 1, 2), Keys.range(0, 3)
END = Clock(10, 10)


def data(model, keys: Keys = KEYS) -> torch.Tensor:
    """Tokens (3, L[, D]) of a model's kind."""
    spec = model.spec
    return token_ids(model) if spec.discrete else keys.normal("x", spec.length, spec.dim)


def learner(model, **section) -> GeneratorLearner:
    return GeneratorLearner(model, PredictionObjective(model, PredictionConfig(**section), 0, 10)).train()


def loss_of(learner, clock: Clock = END, keys: Keys = KEYS) -> torch.Tensor:
    torch.manual_seed(0)  # of dropout
    draws = learner.training_draws(keys)
    return learner(data(learner.model), CLASSES, clock, draws, in_loop(learner.model).get("tokenizer")).loss


def context_of(model, share: float = 1.0, rows: slice = slice(None), **section) -> torch.Tensor:
    """The context that an objective feeds, for some of the rows."""
    section = section or {"scheduled_sampling": ScheduledSampling(share)}
    training = learner(model, **section)
    model.eval()
    draws = {name: value[rows] for name, value in training.training_draws(KEYS).items()}
    return training.objective.context(
        model, data(model)[rows], CLASSES[rows], END, draws, in_loop(model).get("tokenizer")
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("section", [{"next": 1.0}, {"scheduled_sampling": ScheduledSampling(0.5, start=0.5)}])
def test_training_is_plain_to_the_bit_where_nothing_is_replaced(name, section):
    losses = []
    for objective in (False, True):
        model = tiny(name).train()
        training = learner(model, **section) if objective else GeneratorLearner(model).train()
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
        for step in range(3):
            loss = loss_of(training, Clock(step, 10), Keys.range(0, 3, step=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]


@pytest.mark.parametrize("name", ALL)
def test_the_own_tokens_of_a_sample_are_its_own_in_any_batch(name):
    model = tiny(name)
    context = context_of(model)
    assert context.shape == (3, *model.context_shape)
    assert torch.isfinite(context).all()
    given = model.context_of(data(model))
    assert not torch.equal(context, given)
    if model.spec.discrete:
        assert int(context.min()) >= 0
        assert int(context.max()) < model.spec.num_ids
    alone = context_of(model, rows=slice(1, 2))
    torch.testing.assert_close(alone[0].float(), context[1].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_share_of_the_context_is_replaced_and_what_is_predicted_stays(name):
    model = tiny(name)
    given = model.context_of(data(model))
    half, whole = context_of(model, 0.5), context_of(model, 1.0)
    kept = (half == given).view(3, len(given[0]), -1).all(2)
    assert 0 < kept.float().mean() < 1
    if name not in ("mar", "maskgit"):  # whose own tokens are drawn given the unmasked ones
        replaced = ~kept
        assert torch.equal(half[replaced], whole[replaced])
    draws = model.training_draws(KEYS)
    plain, fed = (model(data(model), CLASSES, draws=draws, context=c, **in_loop(model)) for c in (None, whole))
    assert fed.loss != plain.loss
    same = model(data(model), CLASSES, draws=draws, context=given, **in_loop(model))
    torch.testing.assert_close(same.loss, plain.loss, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_any_tokens_take_the_place_of_a_share(name):
    model = tiny(name)
    given, noisy = model.context_of(data(model)), context_of(model, token_noise=0.4)
    changed = (noisy != given).view(3, len(given[0]), -1).any(2)
    assert 0 < changed.float().mean() < 0.8
    training = learner(model, token_noise=0.4, scheduled_sampling=ScheduledSampling(0.3))
    loss = loss_of(training)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in training.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", WHOLE_IDS)
def test_the_loss_is_the_cross_entropy_of_the_data_given_the_context(name):
    model = tiny(name)
    tokens, draws, loop = data(model), model.training_draws(KEYS), in_loop(model)
    draws.pop("drop")
    context = (tokens + 1) % model.spec.num_ids
    logits = model.training_logits(context, CLASSES, draws, loop.get("tokenizer"))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert model(tokens, CLASSES, draws=draws, context=context, **loop).loss.item() == pytest.approx(expected.item())


def test_masked_models_replace_what_is_visible_alone():
    for name in ("maskgit", "mar"):
        model = tiny(name)
        draws, context = model.training_draws(KEYS), context_of(model)
        hidden = draws["masked"]
        if name == "mar":
            hidden = torch.zeros(3, model.length, dtype=torch.bool).scatter(1, hidden, True)
        assert torch.equal(context[hidden], model.context_of(data(model))[hidden])


def test_an_entity_that_was_replaced_is_context_alone():
    model = tiny("xar")  # cells of four tokens
    draws, tokens = model.training_draws(KEYS), data(model)
    sequence = model.context_of(tokens)
    context = sequence.clone()
    context[:, 1] += 1.0  # of the first entity
    output = model(tokens, CLASSES, draws=draws, context=context)
    errors = (output.prediction - (draws["noise"] - sequence)).square()
    drop = CLASSES.drop(draws["drop"] < model.condition_dropout)
    moved = model.velocity(model.noisy(context, draws["noise"], draws["time"]), draws["time"], drop)
    torch.testing.assert_close(output.prediction, moved)
    assert output.loss.item() == pytest.approx(errors[:, 4:].mean().item())
    assert torch.equal(context_of(model)[:, 12:], sequence[:, 12:])  # the last entity is in no context


def test_an_entitys_own_latents_are_where_its_velocity_points():
    model = tiny("xar")
    draws, tokens = model.training_draws(KEYS), data(model)
    sequence, t = model.context_of(tokens), draws["time"].repeat_interleave(4, 1)[..., None]
    noisy = (1 - t) * sequence + t * draws["noise"]
    velocity = model.velocity(noisy, draws["time"], CLASSES.drop(draws["drop"] < model.condition_dropout))
    torch.testing.assert_close(context_of(model)[:, :12], (noisy - t * velocity)[:, :12])


VARIANTS = [
    ("xar", {"layout": {"entity": "scale", "scales": (1, 2, 4)}}),
    ("xar", {"layout": {"entity": "subsample", "size": 2}}),
    ("mar", {"patch_size": 2, "spec": TokenSpec(64, None, dim=4, grid=(8, 8))}),
    ("token_shuffle", {"window": 1}),
    ("randar", {"position_order": "raster"}),
]


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_contexts_of_other_layouts(name, arguments):
    model = tiny(name, **arguments)
    given, half = model.context_of(data(model)), context_of(model, 0.5)
    assert half.shape == given.shape == (3, *model.context_shape)
    assert not torch.equal(half, given)
    loss = loss_of(learner(model, scheduled_sampling=ScheduledSampling(0.5), token_noise=0.2))
    assert torch.isfinite(loss)
    if name == "xar":  # whole entities, except the last
        changed = (half != given).any(2)
        for entity, (first, stop) in enumerate(pairwise(model.layout.bounds)):
            part = changed[:, first:stop]
            assert torch.equal(part.any(1), part.all(1))
            assert entity < model.layout.num_entities - 1 or not part.any()


def test_one_entity_alone_has_no_context():
    model = tiny("xar", layout={"entity": "image"})
    assert torch.equal(context_of(model), model.context_of(data(model)))
    torch.testing.assert_close(loss_of(learner(model, token_noise=0.5)), loss_of(learner(model)))


def last_places(model, draws) -> torch.Tensor:
    """(3, N) bool: the part of the context that is generated last, or that masked models do not see."""
    if "masked" in draws:
        hidden = draws["masked"]
        return hidden if hidden.dtype == torch.bool else torch.zeros(3, model.length).bool().scatter(1, hidden, True)
    places = torch.zeros(3, model.context_shape[0], dtype=torch.bool)
    if "order" in draws:
        return places.scatter(1, draws["order"][:, -1:], True)
    steps = model.plan({}) if isinstance(model, AutoregressiveGenerator) else None
    places[:, -1 if steps is None else steps.places(len(steps) - 1)[0]] = True
    return places


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_predicted_from_what_comes_last(name):
    model, draws = tiny(name), tiny(name).training_draws(KEYS)
    given, last = model.context_of(data(model)), last_places(model, draws)
    other = (given + 1) % model.spec.num_ids if model.spec.discrete else given + 1.0
    moved = torch.where(last if model.spec.discrete else last[..., None], other, given)
    assert not torch.equal(moved, given)
    a, b = (model(data(model), CLASSES, draws=draws, context=c, **in_loop(model)).prediction for c in (given, moved))
    if name == "xar":  # whose last entity is noisy data, and its own context
        a, b = a[:, :12], b[:, :12]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    a, b = (model(data(model), CLASSES, draws=draws, context=c, **in_loop(model)).prediction for c in (given, other))
    assert not torch.allclose(a, b, atol=1e-4)
