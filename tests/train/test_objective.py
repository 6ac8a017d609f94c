"""The objectives of tokenizers: terms that begin and end, reconstructions, weight maps, targets, and games."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import ARGUMENTS, pixels, tiny
from support.tiny_runs import GAN, losses_of, tokenizer_config
from torch import nn

import vistok
from vistok.data.batches import ImageBatch
from vistok.draws import Keys
from vistok.nn.frozen import Frozen
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks import objective as objectives
from vistok.train.tasks.adversary import Adversary, GanConfig
from vistok.train.tasks.objective import TokenizerObjective
from vistok.train.tasks.terms import Term
from vistok.train.tasks.tokenizer import TokenizerTask
from vistok.types import Clock, TokenizerOutput

pytestmark = pytest.mark.usefixtures("one_thread")


def terms_at(step: int, objective: TokenizerObjective, output: TokenizerOutput, target: torch.Tensor) -> dict:
    return objective(output, target, Clock(step, 10), {}, None)  # these terms ask no tokenizer


def outputs(**reconstructions: torch.Tensor) -> TokenizerOutput:
    return TokenizerOutput(reconstructions, torch.zeros(2, 4, dtype=torch.int64))


def test_terms_begin_and_end_at_their_steps():
    model = tiny("vit_vqgan")
    losses = {"l2": {"weight": 2.0, "until_step": 3}, "l1": {"weight": 1.0, "start_step": 2}}
    objective, images = TokenizerObjective(model, losses), pixels(model)
    active = [set(terms_at(step, objective, outputs(main=images), images)) for step in range(5)]
    assert active == [{"l2"}, {"l2"}, {"l1", "l2"}, {"l1"}, {"l1"}]
    assert objective.changes == {2, 3}
    assert objective.complete_from == 2


@pytest.mark.parametrize("name", ["flextok", "dar"])
def test_a_run_weighs_the_terms_of_a_quantizer_by_name(name, tmp_path):
    derived = ("image_size", "in_channels")
    model = {key: value for key, value in ARGUMENTS[name].items() if key not in derived}
    quantizer = {"name": "lfq", "entropy_temperature": 0.1} | ({"dim": 5} if name == "flextok" else {})
    config = tokenizer_config(tmp_path / "run")
    config |= {
        "model": {"name": name, **model, "quantizer": quantizer},
        "losses": {"flow": 1.0, "commitment": 0.25, "entropy": 0.1},
        "training": {"max_steps": 2, "log_every": 1, "image_every": 0, "save_every": 2},
    }
    folder = train(config)
    rows = read_metrics(folder / "metrics.jsonl")
    for row in rows:
        assert row["loss"] == pytest.approx(row["flow"] + 0.25 * row["commitment"] + 0.1 * row["entropy"], rel=1e-5)
    assert len(rows) == 2
    assert vistok.load(folder / "tokenizer").quantizer.dim == (5 if name == "flextok" else 4)
    with pytest.raises(ConfigError, match=r"losses\.codebook: .* It provides: .*commitment, entropy, flow"):
        train(config | {"output_dir": str(tmp_path / "other"), "losses": {"codebook": 1.0}})


def test_every_reconstruction_is_compared_and_weighted_and_ended():
    model = tiny("vit_vqgan")
    losses = {"l1": 1.0, "l2": 3.0, "reconstructions": {"direct": {"weight": 0.5, "until_step": 1}}}
    objective, target = TokenizerObjective(model, losses), pixels(model)
    output = outputs(main=target + 0.2, direct=target + 0.4, other=target + 0.6)
    terms = terms_at(0, objective, output, target)
    native = 0.5  # this tokenizer compares pixels in [0, 1]
    assert {name: round(value.item(), 4) for name, value in terms.items()} == pytest.approx(
        {
            "l1": 0.2 * native,
            "l1/direct": 0.4 * native,
            "l1/other": 0.6 * native,
            "l2": (0.2 * native) ** 2,
            "l2/direct": (0.4 * native) ** 2,
            "l2/other": (0.6 * native) ** 2,
        },
        abs=1e-4,
    )
    expected = (0.1 + 0.5 * 0.2 + 0.3) + 3 * (0.01 + 0.5 * 0.04 + 0.09)
    assert objective.total(terms).item() == pytest.approx(expected, rel=1e-4)
    assert objective.reconstruction_total(terms).item() == pytest.approx(expected, rel=1e-4)
    assert {"l1/direct", "l2/direct"}.isdisjoint(terms_at(1, objective, output, target))


def test_a_weight_map_says_which_pixels_count():
    model = tiny("vit_vqgan")
    objective, target = TokenizerObjective(model, {"l1": 1.0}), pixels(model)
    seen = torch.zeros(3, 1, *target.shape[2:])
    seen[..., :4] = 1
    wrong = target.clone()
    wrong[..., 4:] += 1
    output = outputs(main=wrong)
    assert terms_at(0, objective, output, target)["l1"] > 0.1
    output.weight_maps["main"] = seen
    assert terms_at(0, objective, output, target)["l1"] == 0
    output.weight_maps["main"] = 1 - seen
    assert terms_at(0, objective, output, target)["l1"].item() == pytest.approx(0.5, rel=1e-4)


def test_a_target_beside_the_pixels_is_what_is_reconstructed(tmp_path):
    config = tokenizer_config(tmp_path / "run", losses={"gan": GAN | {"start_step": 0, "balance": "fixed"}})
    task = TokenizerTask(RunConfig.parse(config), 0, 1)
    batch = next(iter(task.loader))
    other = batch._replace(target=-batch.pixels)
    seen = []
    hook = task.adversary.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    clock, players = Clock(0, 6), task.players()
    plain, turned = ({t.player: t for t in task.losses(players, each, clock)} for each in (batch, other))
    hook.remove()
    assert torch.equal(seen[1], task.model.to_native(other.target))
    assert plain["model"].terms["l2"] != turned["model"].terms["l2"]
    assert plain["model"].terms["codebook"] == turned["model"].terms["codebook"]
    assert isinstance(batch, ImageBatch)


def test_weights_say_which_features_count():
    from vistok.losses import alignment_distance

    target = torch.randn(2, 4, 8)
    features = torch.cat([target[:, :2], -target[:, 2:]], 1)
    first = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 4)
    torch.testing.assert_close(alignment_distance(features, target), torch.ones(2))
    torch.testing.assert_close(alignment_distance(features, target, first), torch.zeros(2))
    torch.testing.assert_close(alignment_distance(features, target, 1 - first), torch.full((2,), 2.0))


class Teacher(nn.Module):
    """A frozen network of a trainable loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)


class NoisyTerm(Term):
    """A trainable loss: latents are projected onto the output of a frozen teacher, with noise."""

    def __init__(self, name, config, tokenizer):
        super().__init__(name, config)
        self.projection, self.teacher = nn.Linear(tokenizer.spec.dim, 3), Frozen(Teacher())

    def frozen(self):
        return {"teacher": self.teacher.network}

    def training_draws(self, keys):
        return {"projection": keys.normal("projection", 3)}

    def forward(self, output, target, clock, draws, tokenizer):
        latents = output.features["latents"].mean(1)
        wanted = self.teacher.network.layer(latents).detach() + clock.progress * draws["projection"]
        return (self.projection(latents) - wanted).square().mean()


@pytest.fixture
def _noisy(monkeypatch):
    monkeypatch.setitem(objectives.TERMS, "noisy", NoisyTerm)


@pytest.mark.usefixtures("_noisy")
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_trainable_loss_is_optimised_saved_resumed_and_not_exported(tmp_path, ema):
    from support.tiny_runs import killed_at

    losses, training = {"noisy": 0.5}, {"ema_decay": ema}
    validation = {"data": {"split": "test", "limit": 20}}
    whole = train(tokenizer_config(tmp_path / "whole", losses=losses, training=training, validation=validation))
    config = tokenizer_config(tmp_path / "part", losses=losses, training=training, validation=validation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.train.loop.Trainer.optimise", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    part = train(config, resume=True)
    assert losses_of(part) == losses_of(whole)
    states = [
        torch.load(whole / "checkpoints" / f"step-000000{step}" / "state.pt", weights_only=True) for step in (3, 6)
    ]
    key = "objective.terms.noisy.projection.weight"
    first, last = (state["players"]["model"]["weights"] for state in states)
    assert not torch.equal(first[key], last[key]), "it is trained"
    assert first.keys() == {key, key.replace("weight", "bias")}, "the teacher is not saved"
    assert key in states[0]["players"]["model"]["optimizer"]
    assert len(states[0]["frozen"]["teacher"]) == 64
    from safetensors.torch import load_file

    assert not [name for name in load_file(whole / "tokenizer" / "model.safetensors") if "noisy" in name]
    assert read_metrics(whole / "metrics.jsonl")[2]["val_noisy"] > 0


@pytest.mark.usefixtures("_noisy")
def test_a_trainable_loss_can_begin_with_a_resume_and_its_teacher_must_stay(tmp_path, caplog, monkeypatch):
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
    config = tokenizer_config(folder, losses={"noisy": 0.5})
    train(config, resume=True)
    assert "do not share begin afresh: objective.terms.noisy" in caplog.text
    assert "noisy" in read_metrics(folder / "metrics.jsonl")[-1]
    fill = Teacher.__init__
    monkeypatch.setattr(Teacher, "__init__", lambda self: (fill(self), self.layer.weight.data.zero_())[0])
    config["training"] |= {"max_steps": 7}
    from vistok.checkpoints import CheckpointError

    with pytest.raises(CheckpointError, match="teacher has other weights than in the run that saved the checkpoint"):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"l2": {"weight": 1.0, "until": 3}}, r"losses\.l2\.until.*did you mean losses\.l2\.until_step"),
        ({"l2": {"weight": 1.0, "start_step": -1}}, r"losses\.l2: start_step must be at least 0, got -1"),
        ({"l2": {"start_step": 1}}, r"losses\.l2\.weight: missing"),
        ({"reconstructions": {"direct": {"wait": 1.0}}}, r"losses\.reconstructions\.direct\.wait.*weight"),
        ({"reconstructions": 3}, r"losses\.reconstructions: got 3"),
        ({"gan": GAN | {"loss": "hinge", "smoothing": {}}}, r"smoothing needs a cross entropy"),
        ({"gan": GAN | {"augment": {"group": []}}}, r"losses\.gan\.augment\.group.*groups"),
        ({"gan": GAN | {"lecam_decay": 1.0}}, r"decay must lie in \[0, 1\)"),
        ({"gan": GAN | {"every_n_steps": 0}}, r"every_n_steps must be at least 1"),
        ({"gan": GAN | {"order": "both"}}, r"losses\.gan\.order.*'model_first' \| 'adversary_first'"),
    ],
)
def test_bad_losses_are_refused_before_work(tmp_path, losses, message):
    with pytest.raises(ConfigError, match=message):
        train(tokenizer_config(tmp_path / "run", losses={"l2": 1.0} | losses))
    assert not (tmp_path / "run").exists()


def test_no_term_at_a_step_is_said(tmp_path):
    config = tokenizer_config(tmp_path / "run")
    config["losses"] = {"l2": {"weight": 1.0, "start_step": 2}}
    with pytest.raises(ConfigError, match="no term counts at this step"):
        train(config)


def turns(tmp_path, gan: dict, step: int) -> list[str]:
    """Who moves, in order."""
    config = tokenizer_config(tmp_path / "run", losses={"gan": GAN | {"balance": "fixed"} | gan})
    task = TokenizerTask(RunConfig.parse(config), 0, 1)
    batch = next(iter(task.loader))
    return [turn.player for turn in task.losses(task.players(), batch, Clock(step, 6))]


def test_the_adversary_learns_every_few_steps_and_may_move_first(tmp_path):
    rare = {"start_step": 1, "every_n_steps": 2}
    assert [turns(tmp_path, rare, step) for step in range(4)] == [
        ["model"],
        ["model", "adversary"],
        ["model"],
        ["model", "adversary"],
    ]
    assert turns(tmp_path, rare | {"order": "adversary_first"}, 1) == ["adversary", "model"]


def test_who_moves_first_is_met_as_it_then_is(tmp_path):
    """With the adversary first, the model's loss is that of the moved adversary."""
    runs = {}
    for order in ("model_first", "adversary_first"):
        gan = GAN | {"start_step": 0, "balance": "fixed", "order": order}
        config = tokenizer_config(tmp_path / order, losses={"gan": gan}, training={"max_steps": 1})
        runs[order] = read_metrics(train(config) / "metrics.jsonl")[0]
    assert runs["model_first"]["d_loss"] == runs["adversary_first"]["d_loss"]
    assert runs["model_first"]["g_loss"] != runs["adversary_first"]["g_loss"]


def adversary(**gan) -> Adversary:
    torch.manual_seed(0)
    config = GanConfig(**{"weight": 1.0, "discriminator": {"width": 4, "num_layers": 1, "norm": "none"}} | gan)
    return Adversary(config, (1, 16, 16))


def test_smoothed_targets_are_drawn_by_sample():
    real, fake = Keys.range(0, 4).uniform("images", 1, 16, 16).chunk(2)
    smooth = adversary(loss="non_saturating", smoothing=objectives_smoothing())
    keys = Keys(0, (5, 9), 3)
    both = smooth(real, fake, keys)["d_loss"]
    assert both != adversary(loss="non_saturating")(real, fake, keys)["d_loss"]
    ones = [smooth(real[i : i + 1], fake[i : i + 1], Keys(0, (keys.indices[i],), 3))["d_loss"] for i in range(2)]
    torch.testing.assert_close(torch.stack(ones).mean(), both)


def objectives_smoothing():
    from vistok.losses import Smoothing

    return Smoothing()


def test_discriminators_are_built_from_the_data_and_see_augmented_images():
    images = Keys.range(0, 4).uniform("images", 3, 32, 32) * 2 - 1
    for discriminator in ({"name": "pooled", "width": 8, "norm_groups": 4, "grid": 4}, {"name": "stylegan"}):
        game = Adversary(GanConfig(1.0, discriminator=discriminator, augment={}), (3, 32, 32))
        assert game(images, -images, Keys.range(0, 4))["d_loss"].isfinite()
        assert game.generator_loss(images, Keys.range(0, 4)) != game._generator_loss(game.discriminator(images))
    clips = Keys.range(0, 2).uniform("clips", 3, 4, 16, 16)
    small = {"name": "vit", "dim": 16, "num_layers": 1, "num_heads": 2}
    game = Adversary(GanConfig(1.0, discriminator=small), (3, 4, 16, 16))
    assert game(clips, -clips, Keys.range(0, 2))["d_loss"].isfinite()


def test_a_discriminator_that_draws_gets_its_numbers_by_batch():
    game, seen = adversary(), []

    class Cropping(type(game.discriminator)):
        num_uniforms = 3

        def forward(self, images, uniforms=None):
            seen.append(uniforms)
            return super().forward(images)

    game.discriminator.__class__ = Cropping
    images = torch.zeros(2, 1, 16, 16)
    game(images, images, Keys(0, (3, 4), 7))
    game(images, images, Keys(0, (5, 6), 7))  # the share of another process in the same step
    assert [len(uniforms) for uniforms in seen] == [3] * 4
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
