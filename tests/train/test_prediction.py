"""Predictions of a generator's training: each loss in its textbook form on a toy, and the runs that they make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import labels, tiny
from support.tiny_runs import generator_config, killed_at, losses_of, write_tokens
from torch.nn import functional as F

import vistok
from vistok.config import ConfigError
from vistok.draws import Keys
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks.prediction import PredictionConfig, PredictionObjective, ScheduledSampling
from vistok.types import Clock, TokenSpec

TOY = TokenSpec(4, 8, dim=4, grid=(2, 2))
IDS = torch.tensor([[3, 1, 7, 0], [2, 2, 5, 6]])
CLASSES = labels(1, 2)
NEXT_TOKEN = ["llama", "vit_vqgan_gpt", "ibq_gpt"]


@pytest.fixture(params=NEXT_TOKEN)
def model(request):
    return tiny(request.param, spec=TOY)


def objective(model, **section) -> PredictionObjective:
    torch.manual_seed(0)
    return PredictionObjective(model, PredictionConfig(**section), 0, 10).eval()


def cross_entropy(logits: torch.Tensor, target: int) -> float:
    """In nats, by hand."""
    logits = logits.detach().double()
    return float(logits.exp().sum().log() - logits[target])


def test_next_is_the_models_own_loss(model):
    output = objective(model, next=1.0, token_noise=0.0)(model, IDS, CLASSES, Clock(0, 10), {})
    logits = model.logits(IDS, CLASSES)
    by_hand = [cross_entropy(logits[row, place], int(IDS[row, place])) for row in range(2) for place in range(4)]
    assert output.loss.item() == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    assert torch.equal(output.loss, model(IDS, CLASSES).loss)


def test_next_all_is_the_mean_over_all_later_tokens_of_each_position(model):
    ahead = objective(model, next=0.0, next_all=1.0, next_all_targets=0)
    loss = ahead(model, IDS, CLASSES, Clock(0, 10), {}).loss.item()
    means = []
    for row in range(2):
        for k in range(4):
            # Of position k only the tokens before it are there: the others are another model's concern.
            prefix = torch.cat([IDS[row : row + 1, :k], torch.zeros(1, 4 - k, dtype=torch.int64)], 1)
            x = model.embed_sequence(prefix[:, :-1], labels(int(CLASSES.labels[row])))
            condition = labels(int(CLASSES.labels[row]))
            mask = model.attention_mask(condition, 0, x.shape[1])
            hidden = model.transform(x, slice(0, x.shape[1]), mask, None, *model.condition_state(condition))
            here = hidden[:, model.condition_length - 1 :]
            logits = ahead.next_all_logits(model, here, torch.arange(4).expand(1, 4, 4))[0, k]
            means.append(sum(cross_entropy(logits[j], int(IDS[row, j])) for j in range(k, 4)) / (4 - k))
    assert loss == pytest.approx(sum(means) / 8, rel=1e-4)


def test_next_all_logits_see_nothing_from_their_position_on(model):
    ahead = objective(model, next=0.0, next_all=1.0, next_all_targets=0)
    other = IDS.clone()
    other[:, 2:] = 7 - other[:, 2:]
    a, b = (ahead._next_all(model, ids, ids, CLASSES, None).prediction for ids in (IDS, other))
    assert a.shape == (2, 4, 4, 8)
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.equal(a[:, 3], b[:, 3])


def test_drawn_targets_are_later_tokens_and_their_mean_is_the_whole(model):
    ahead = objective(model, next=0.0, next_all=1.0, next_all_targets=64)
    draws = ahead.training_draws(Keys.range(0, 2), 4)
    assert draws["targets"].shape == (2, 4, 64)
    drawn = ahead._next_all(model, IDS, IDS, CLASSES, draws["targets"]).loss.item()
    every = ahead._next_all(model, IDS, IDS, CLASSES, None).loss.item()
    assert drawn == pytest.approx(every, rel=0.1)
    # The last number below 1 is the last token, and 0 the position's own.
    ends = ahead._next_all(model, IDS, IDS, CLASSES, torch.full((2, 4, 1), 1 - 1e-7)).loss
    ends.backward()
    assert torch.equal(ahead.target_positions.grad[:3], torch.zeros_like(ahead.target_positions.grad[:3]))


def test_random_predicts_hidden_tokens_from_all_others(model):
    masked = objective(model, next=0.0, random=1.0, masked=0.5)
    uniforms = torch.tensor([[0.9, 0.1, 0.9, 0.9], [0.1, 0.9, 0.2, 0.1]])  # below 0.5 is hidden; the last always is
    output = masked(model, IDS, CLASSES, Clock(0, 10), {"masked": uniforms})
    hidden = [[1, 3], [0, 2, 3]]
    rows = [
        sum(cross_entropy(output.prediction[r, k], int(IDS[r, k])) for k in hidden[r]) / len(hidden[r]) for r in (0, 1)
    ]
    assert output.loss.item() == pytest.approx(sum(rows) / 2, rel=1e-4)
    # What is hidden changes nothing; what is seen reaches earlier places, too.
    for place, reaches in ((1, False), (2, True)):
        other = IDS.clone()
        other[0, place] = 4
        again = masked(model, other, CLASSES, Clock(0, 10), {"masked": uniforms}).prediction
        assert torch.equal(again[0, 1], output.prediction[0, 1]) != reaches


def test_scheduled_sampling_feeds_the_models_own_draws_by_a_rising_share():
    model = tiny("llama", spec=TOY)
    training = objective(model, scheduled_sampling=ScheduledSampling(1.0, start=0.2, end=0.6))
    draws = training.training_draws(Keys.range(0, 2), 4)
    assert training.context(model, IDS, CLASSES, Clock(2, 10), draws) is None  # share 0: the data alone
    context = training.context(model, IDS, CLASSES, Clock(6, 10), draws)  # share 1: its own draws alone
    probs = model.logits(IDS, CLASSES).softmax(-1)
    cumulative = probs.cumsum(-1)
    for row in range(2):
        for place in range(4):
            number = float(draws["own"][row, place, 1])
            assert int(context[row, place]) == int((cumulative[row, place] <= number).sum())
    half = training.context(model, IDS, CLASSES, Clock(4, 10), draws)
    assert torch.equal(half, torch.where(draws["own"][..., 0] < 0.5, context, IDS))
    output = training(model, IDS, CLASSES, Clock(6, 10), draws)
    assert torch.equal(output.prediction, model.logits(context, CLASSES))
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.prediction.flatten(0, 1), IDS.flatten()).item())


def test_token_noise_feeds_any_ids_for_a_share_of_the_context():
    model = tiny("llama", spec=TokenSpec(400, 8, dim=4, grid=(20, 20)))
    noisy = objective(model, token_noise=0.25)
    tokens = torch.zeros(2, 400, dtype=torch.int64)
    draws = noisy.training_draws(Keys.range(0, 2), 400)
    context = noisy.context(model, tokens, CLASSES, Clock(0, 10), draws)
    assert context.unique().tolist() == list(range(8))
    assert (context != 0).float().mean().item() == pytest.approx(0.25 * 7 / 8, abs=0.05)


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
        ({"next": 1.5, "random": -0.5}, "must be positive"),
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


@pytest.mark.parametrize("name", ["mar", "xar", "rar", "var", "maskgit", "randar", "token_shuffle", "open_magvit2_gpt"])
def test_generators_with_objectives_of_their_own_refuse(name):
    with pytest.raises(ConfigError, match=r"objective\.token_noise: .* has an objective of its own"):
        PredictionObjective(tiny(name), replace(PredictionConfig(), token_noise=0.1), 0, 10)
