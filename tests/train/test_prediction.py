"""Prediction objectives of generators: each loss against its textbook form on a toy model, and runs with them.

``test_context.py`` tests, for all generators, the contexts that replace the data.
"""

from __future__ import annotations

import pytest
import torch
from support.throwaway.generator import Scattered
from support.tiny_models import labels, tiny
from support.tiny_runs import generator_config, killed_at, losses_of, write_tokens
from torch.nn import functional as F

import vistok
from vistok.draws import Keys
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks.prediction import PredictionConfig, PredictionObjective, ScheduledSampling
from vistok.types import Clock, TokenSpec

TOY = TokenSpec(4, 8, dim=4, grid=(2, 2))
IDS = torch.tensor([[3, 1, 7, 0], [2, 2, 5, 6]])
CLASSES = labels(1, 2)
ORDERS = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
"""Of the tokens of the two samples, where a model predicts them in orders of their own."""
MIXED = {
    "llama": {},
    "vit_vqgan_gpt": {},
    "ibq_gpt": {},
    "rar": {},
    "randar": {},
    "open_magvit2_gpt": {"factorized_bits": (1, 2)},
}
"""The systems that take a mixture of predictions."""


@pytest.fixture(params=MIXED)
def model(request):
    return tiny(request.param, spec=TOY, **MIXED[request.param])


@pytest.fixture
def draws(model):
    """Of training; orders, of models that have any."""
    return {"order": ORDERS} if "order" in model.training_draws(Keys.range(0, 2)) else {}


def in_order(draws) -> torch.Tensor:
    """(2, 4), the places of the tokens in the order in which they are predicted."""
    return draws.get("order", torch.arange(4).expand(2, -1))


def objective(model, **section) -> PredictionObjective:
    torch.manual_seed(0)
    return PredictionObjective(model, PredictionConfig(**section), 0, 10).eval()


def nats(model, logits: list[torch.Tensor], token: int) -> float:
    """The cross entropy of an id by hand, the sum over its parts, each with logits (V_p,)."""
    parts = model.split_ids(torch.tensor(token))
    rows = [part.detach().double() for part in logits]
    return sum(float(row.exp().sum().log() - row[int(part)]) for row, part in zip(rows, parts, strict=True))


def parts_of(model, prediction: torch.Tensor) -> list[torch.Tensor]:
    """Predictions (..., sum of all V_p) part by part."""
    sizes = model.sub_tokens.sizes if model.num_parts > 1 else (8,)
    return list(prediction.split(sizes, -1))


def test_next_is_the_models_own_loss(model, draws):
    output = objective(model, next=1.0, token_noise=0.0)(model, IDS, CLASSES, Clock(0, 10), draws)
    logits = parts_of(model, output.prediction)
    wanted = IDS.gather(1, in_order(draws))
    by_hand = [nats(model, [x[row, k] for x in logits], int(wanted[row, k])) for row in range(2) for k in range(4)]
    assert output.loss.item() == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    assert torch.equal(output.loss, model(IDS, CLASSES, draws=draws).loss)


def test_next_all_is_the_mean_over_all_later_tokens_of_each_position(model, draws):
    ahead = objective(model, next=0.0, next_all=1.0, next_all_targets=0)
    loss = ahead(model, IDS, CLASSES, Clock(0, 10), draws).loss.item()
    order, means = in_order(draws), []
    for row in range(2):
        for k in range(4):
            # Of position k only the tokens before it are there: the others are another model's concern.
            prefix, condition = IDS[row : row + 1].clone(), labels(int(CLASSES.labels[row]))
            prefix[0, order[row, k:]] = 0
            own = {name: value[row : row + 1] for name, value in draws.items()}
            entries = model.ordered_entries(prefix, condition, own)
            mask = model.attention_mask(condition, 0, entries.x.shape[1])
            hidden = model.transform(entries.x, entries.positions, mask, None, *model.condition_state(condition))
            here, places = hidden[:, entries.states], order[row].expand(1, 4, 4)
            wanted = IDS[row, order[row]].expand(1, 4, 4)
            logits = [part[0, k] for part in ahead.next_all_logits(model, here, places, wanted)]
            later = [nats(model, [x[j] for x in logits], int(wanted[0, k, j])) for j in range(k, 4)]
            means.append(sum(later) / (4 - k))
    assert loss == pytest.approx(sum(means) / 8, rel=1e-4)


def test_next_all_logits_see_nothing_from_their_position_on(model, draws):
    ahead = objective(model, next=0.0, next_all=1.0, next_all_targets=0)
    order, other = in_order(draws), IDS.clone()
    changed = order[:, 2:]
    other.scatter_(1, changed, 7 - other.gather(1, changed))
    a, b = (ahead._next_all(model, IDS, fed, CLASSES, draws).prediction for fed in (IDS, other))
    assert a.shape[:3] == (2, 4, 4)
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.equal(a[:, 3], b[:, 3])


def test_drawn_targets_are_later_tokens_and_their_mean_is_the_whole(model, draws):
    ahead = objective(model, next=0.0, next_all=1.0, next_all_targets=64)
    drawn = draws | ahead.training_draws(Keys.range(0, 2), model)
    assert drawn["targets"].shape == (2, 4, 64)
    some = ahead._next_all(model, IDS, None, CLASSES, drawn).loss.item()
    every = ahead._next_all(model, IDS, None, CLASSES, draws).loss.item()
    assert some == pytest.approx(every, rel=0.1)
    # The largest number below 1 gives the last token, 0 gives the position's own.
    ends = draws | {"targets": torch.full((2, 4, 1), 1 - 1e-7)}
    ahead._next_all(model, IDS, None, CLASSES, ends).loss.backward()
    reached = set(in_order(draws)[:, -1].tolist())
    gradient = ahead.target_positions.grad
    assert {place for place in range(4) if bool(gradient[place].any())} == reached


def test_random_predicts_hidden_tokens_from_all_others(model, draws):
    masked = objective(model, next=0.0, random=1.0, masked=0.5)
    uniforms = torch.tensor([[0.9, 0.1, 0.9, 0.9], [0.1, 0.9, 0.2, 0.1]])  # below 0.5 is hidden; the last always is
    order = in_order(draws)
    drawn = draws | {"hidden": torch.empty(2, 4).scatter(1, order, uniforms)}
    output = masked(model, IDS, CLASSES, Clock(0, 10), drawn)
    logits, wanted = parts_of(model, output.prediction), IDS.gather(1, order)
    hidden = [[1, 3], [0, 2, 3]]
    rows = [
        sum(nats(model, [x[r, k] for x in logits], int(wanted[r, k])) for k in hidden[r]) / len(hidden[r])
        for r in (0, 1)
    ]
    assert output.loss.item() == pytest.approx(sum(rows) / 2, rel=1e-4)
    # Hidden tokens do not influence the predictions of others; visible ones also influence earlier positions.
    for number, reaches in ((3, False), (2, True)):
        other = IDS.clone()
        other[0, order[0, number]] = 4
        again = masked(model, other, CLASSES, Clock(0, 10), drawn).prediction
        assert torch.equal(again[0, 1], output.prediction[0, 1]) != reaches


def test_scheduled_sampling_feeds_the_models_own_draws_by_a_rising_share():
    model = tiny("llama", spec=TOY)
    training = objective(model, scheduled_sampling=ScheduledSampling(1.0, start=0.2, end=0.6))
    draws = training.training_draws(Keys.range(0, 2), model)
    assert training.context(model, IDS, CLASSES, Clock(2, 10), draws) is None  # share 0: only the data
    context = training.context(model, IDS, CLASSES, Clock(6, 10), draws)  # share 1: only its own draws
    probs = model.logits(IDS, CLASSES).softmax(-1)
    cumulative = probs.cumsum(-1)
    for row in range(2):
        for place in range(4):
            number = float(draws["own"][row, place, 0])
            assert int(context[row, place]) == int((cumulative[row, place] <= number).sum())
    half = training.context(model, IDS, CLASSES, Clock(4, 10), draws)
    assert torch.equal(half, torch.where(draws["replaced"] < 0.5, context, IDS))
    output = training(model, IDS, CLASSES, Clock(6, 10), draws)
    assert torch.equal(output.prediction, model.logits(context, CLASSES))
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.prediction.flatten(0, 1), IDS.flatten()).item())


def test_sub_tokens_are_drawn_one_after_another():
    model = tiny("open_magvit2_gpt", spec=TOY, **MIXED["open_magvit2_gpt"])
    training = objective(model, scheduled_sampling=ScheduledSampling(1.0))
    draws = training.training_draws(Keys.range(0, 2), model)
    assert draws["own"].shape == (2, 4, 2)
    context = training.context(model, IDS, CLASSES, Clock(10, 10), draws)
    first, second = model.part_predictions(context, CLASSES, context=IDS)  # the second sees the drawn first
    for part, logits, numbers in zip(model.split_ids(context), (first, second), draws["own"].unbind(-1)):
        cumulative = logits.softmax(-1).cumsum(-1)
        assert torch.equal(part, (cumulative <= numbers[..., None]).sum(-1))


def test_shares_are_drawn_for_each_batch_and_change_with_progress():
    model = tiny("llama", spec=TOY)
    training = PredictionObjective(model, PredictionConfig((0.2, 1.0), (0.3, 0.0), (0.5, 0.0)), 0, 2000)
    drawn = [training.choose(step) for step in range(2000)]
    assert drawn[:100].count("random") == pytest.approx(50, abs=15)
    assert drawn[1000:1100].count("next") == pytest.approx(60, abs=15)
    assert drawn[-20:].count("next") >= 19
    assert drawn == [training.choose(step) for step in range(2000)]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


def test_a_run_with_shares_of_zero_is_plain_training_to_the_bit(tokens, tmp_path):
    plain = train(generator_config(tmp_path / "plain", tokens))
    section = {"next": 1.0, "next_all": 0.0, "random": 0.0, "scheduled_sampling": {"share": 0.0}}
    mixed = train(generator_config(tmp_path / "mixed", tokens) | {"objective": section})
    assert losses_of(plain) == losses_of(mixed)
    one, other = (vistok.load(run / "generator").state_dict() for run in (plain, mixed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_of_all_predictions_is_saved_without_their_parts_and_resumed_exactly(tokens, tmp_path, monkeypatch):
    section = {"next": 0.4, "next_all": 0.3, "random": 0.3, "token_noise": 0.1}
    section["scheduled_sampling"] = {"share": 0.5}
    whole = train(generator_config(tmp_path / "whole", tokens) | {"objective": section})
    rows = read_metrics(whole / "metrics.jsonl")
    named = {name for row in rows for name in row if name.endswith("_loss")}
    assert named == {"next_loss", "next_all_loss", "random_loss"}
    assert not [name for name in vistok.load(whole / "generator").state_dict() if "objective" in name]
    config = generator_config(tmp_path / "parts", tokens) | {"objective": section}
    with monkeypatch.context() as patched:
        patched.setattr("vistok.train.loop.Trainer.optimise", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert losses_of(train(config, resume=True)) == losses_of(whole)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"next": 0.5}, "add up to 1; at the beginning they are next 0.5, next_all 0, random 0, 0.5 in all"),
        ({"next": [1.0, 0.5]}, "at the end they are next 0.5"),
        ({"next": 1.5, "random": -0.5}, "must be 0 or more and add up to 1"),
        ({"masked": 0.0}, r"masked must lie in \(0, 1\]"),
        ({"token_noise": 1.0}, r"token_noise must lie in \[0, 1\)"),
        ({"scheduled_sampling": {"share": 2.0}}, r"share must lie in \[0, 1\], got 2"),
        ({"scheduled_sampling": {"share": 0.2, "start": 0.5, "end": 0.5}}, "0 <= start < end <= 1"),
        ({"next_one": 1.0}, "next_one"),
    ],
)
def test_bad_sections_are_named(section, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(generator_config(tmp_path / "run", "tokens") | {"objective": section})


@pytest.mark.parametrize("name", ["lpd", "token_shuffle", "var", "maskgit", "mar", "xar", "ming_univision"])
@pytest.mark.parametrize("prediction", ["next_all", "random"])
def test_models_that_predict_no_single_id_refuse_a_mixture_and_say_why(name, prediction):
    section = PredictionConfig(next=0.5, **{prediction: 0.5})
    model = tiny(name)
    with pytest.raises(ConfigError, match=rf"objective\.{prediction}: .* cannot learn it: {model.only_next}"):
        PredictionObjective(model, section, 0, 10)


def test_a_training_pass_that_takes_no_context_refuses_the_section():
    model = Scattered(**Scattered.tiny)
    with pytest.raises(ConfigError, match="the training pass of Scattered takes no context; leave the section out"):
        PredictionObjective(model, PredictionConfig(token_noise=0.1), 0, 10)
