"""What a run starts from: weights of other runs, frozen parameters, and a checkpoint of a config that has changed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny
from support.tiny_runs import GAN, losses_of, tokenizer_config

import vistok
from vistok.checkpoints import CheckpointError
from vistok.signatures import ConfigError
from vistok.train import start, train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics

STILL = {"optimizer": {"lr": 0.0}, "training": {"max_steps": 1, "image_every": 0}}
"""A run that does not change its weights."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return train(tokenizer_config(tmp_path_factory.mktemp("first") / "run", training={"max_steps": 3}))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "tokenizer" / "model.safetensors")


def test_several_sources_of_which_later_ones_win(tmp_path, first, caplog):
    whole = weights_of(first)
    save_file({f"old.{k[8:]}": v + 1 for k, v in whole.items() if k.startswith("encoder.")}, tmp_path / "e.safetensors")
    sources = [
        str(first),
        {"path": str(tmp_path / "e.safetensors"), "module": "encoder", "rename": {r"old\.": ""}},
    ]
    folder = train(tokenizer_config(tmp_path / "run", init_from=sources, **STILL))
    for key, tensor in weights_of(folder).items():
        assert torch.allclose(tensor, whole[key] + key.startswith("encoder."), atol=1e-6), key
    assert "stay new" not in caplog.text


def test_what_a_source_lacks_stays_new_and_is_named(tmp_path, first, caplog):
    whole = weights_of(first)
    some = {k: v for k, v in whole.items() if not k.startswith("decoder.")} | {"teacher.weight": torch.zeros(2)}
    save_file(some, tmp_path / "some.safetensors")
    source = {"path": str(tmp_path / "some.safetensors")}
    with pytest.raises(CheckpointError, match=r"missing: decoder.*1 surplus: teacher\.weight"):
        train(tokenizer_config(tmp_path / "strict", init_from=source, **STILL))
    folder = train(tokenizer_config(tmp_path / "run", init_from=source | {"strict": False}, **STILL))
    assert "1 keys are not used: teacher.weight" in caplog.text
    assert f"{len(whole) - len(some) + 1} entries of the model stay new: decoder" in caplog.text
    found = weights_of(folder)
    assert all(torch.allclose(found[key], whole[key], atol=1e-6) for key in found if key in some)
    dropped = source | {"rename": {r"teacher\.": None}, "strict": False}
    caplog.clear()
    train(tokenizer_config(tmp_path / "dropped", init_from=dropped, **STILL))
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"module": "encoder.blok"}, r"ViTVQGAN has no 'encoder\.blok'; it has .*encoder"),
        ({"rename": {"nothing": "x"}}, r"no key begins with 'nothing' \(rename\)"),
        ({"rename": {r".*": "x"}}, r"rename gives two tensors the name x"),
        ({"rename": {r"": "y."}, "strict": False}, r"has none of its keys, which are y\."),
        ({"strikt": False}, r"init_from\.strikt.*did you mean init_from\.strict"),
    ],
)
def test_bad_sources_are_refused(tmp_path, first, source, message):
    with pytest.raises(ValueError, match=message):
        train(tokenizer_config(tmp_path / "run", init_from={"path": str(first)} | source))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_size_are_told_by_the_arguments(tmp_path, first):
    with pytest.raises(CheckpointError, match=r"does not fit ViTVQGAN; .* of another shape") as refused:
        train(tokenizer_config(tmp_path / "run", init_from=str(first), model={"codebook_embed_dim": 2}))
    (note,) = refused.value.__notes__
    assert note.startswith("model.codebook_embed_dim is 2 here, and ")
    assert note.endswith(f" in {first}")


def test_frozen_parameters_stay_and_their_modules_do_not_train(tmp_path, first, monkeypatch):
    model = {"codebook_restart_after": 1}
    before = weights_of(train(tokenizer_config(tmp_path / "before", **STILL)))  # the same seed
    config = tokenizer_config(
        tmp_path / "run",
        model=model,
        freeze=["encoder.*", "quantizer.*"],
        training={"max_steps": 2, "ema_decay": 0.0},
    )
    modes = {}
    from vistok.tokenizers.vit_vqgan import ViTVQGAN

    forward = ViTVQGAN.forward

    def watched(self, *given, **named):
        if self.training:  # rather than shown in a report
            modes.update({name: module.training for name, module in self.named_children()})
        return forward(self, *given, **named)

    monkeypatch.setattr(ViTVQGAN, "forward", watched)
    after = weights_of(train(config))
    frozen = ("encoder.", "quantizer.")
    idle = after.pop("quantizer.restart.idle")
    assert (idle == 1).all(), "no step of a frozen quantizer counts"
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key]) == (key.startswith(frozen) or "positions" in key), key
    assert not modes["encoder"]
    assert modes["decoder"]


def test_a_pattern_that_fits_nothing_is_an_error(tmp_path):
    for changes in ({"freeze": ["enkoder.*"]}, {"optimizer": {"no_decay": ["enkoder.*"]}}):
        with pytest.raises(ConfigError, match=r"no parameter is called 'enkoder\.\*'; .*encoder"):
            train(tokenizer_config(tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match="nothing to train"):
        train(tokenizer_config(tmp_path / "run", freeze=["*"]))


def test_groups_have_rates_and_decays_of_their_own():
    from vistok.train.config import GroupConfig, OptimizerConfig
    from vistok.train.optim import build_optimizer

    module = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "trunk": torch.nn.Linear(2, 2)})
    names = {parameter: name for name, parameter in module.named_parameters()}

    def groups(**options) -> dict[str, tuple[float, float]]:
        optimizer = build_optimizer(module.named_parameters(), OptimizerConfig(lr=1.0, weight_decay=0.5, **options))
        found = optimizer.param_groups
        return {names[p]: (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}

    assert groups() == {"head.weight": (1, 0.5), "trunk.weight": (1, 0.5), "head.bias": (1, 0), "trunk.bias": (1, 0)}
    assert groups(decayed="all", no_decay=("trunk.bias",))["head.bias"] == (1, 0.5)
    assert groups(decayed="all", no_decay=("trunk.bias",))["trunk.bias"] == (1, 0)
    own = (GroupConfig(("head.*",), lr=0.1), GroupConfig(("*.bias",), weight_decay=0.25))
    assert groups(groups=own) == {
        "head.weight": (0.1, 0.5),
        "trunk.weight": (1, 0.5),
        "head.bias": (0.1, 0.25),
        "trunk.bias": (1, 0.25),
    }


def test_groups_come_from_the_config_and_follow_the_schedule(tmp_path):
    groups = [{"parameters": ["encoder.*"], "lr": 0.0}]
    before = weights_of(train(tokenizer_config(tmp_path / "before", **STILL)))
    config = tokenizer_config(
        tmp_path / "run", optimizer={"groups": groups}, training={"max_steps": 2, "ema_decay": 0.0}
    )
    after = weights_of(train(config))
    assert all(torch.equal(v, before[k]) == (k.startswith("encoder.") or "positions" in k) for k, v in after.items())


def test_schedules_end_at_a_rate_and_begin_late():
    from vistok.train.config import SchedulerConfig
    from vistok.train.optim import lr_factor

    cosine = lr_factor(SchedulerConfig("cosine", final_lr=1e-5), 100, lr=1e-4)
    assert cosine(0) == 1
    assert cosine(99) == pytest.approx(0.1)
    late = lr_factor(SchedulerConfig("cosine", warmup_steps=2, start_step=50), 100)
    whole = lr_factor(SchedulerConfig("cosine", warmup_steps=2), 50)
    assert [late(step) for step in range(50, 100)] == [whole(step) for step in range(50)]
    with pytest.raises(ValueError, match="say the same thing"):
        SchedulerConfig("cosine", final_factor=0.1, final_lr=1e-5)


def test_a_player_has_an_optimizer_schedule_and_clipping_of_its_own(tmp_path):
    gan = GAN | {"start_step": 0}
    players = {"adversary": {"optimizer": {"lr": 0.0}, "lr_scheduler": {"name": "constant"}, "max_grad_norm": 0}}
    config = tokenizer_config(tmp_path / "run", losses={"gan": gan}, players=players)
    folder = train(config)
    rows = read_metrics(folder / "metrics.jsonl")
    assert "grad_norm" in rows[0]
    assert "d_grad_norm" not in rows[0]
    states = [
        torch.load(folder / "checkpoints" / f"step-000000{step}" / "state.pt", weights_only=True) for step in (3, 6)
    ]
    first, last = (state["players"]["adversary"]["weights"] for state in states)
    assert all(torch.equal(first[key], last[key]) for key in first if key.endswith(("weight", "bias")))
    with pytest.raises(ConfigError, match=r"players\.critic.*adversary"):
        train(tokenizer_config(tmp_path / "other", losses={"gan": gan}, players={"critic": {}}))


def test_a_player_of_another_schedule_takes_over_only_the_keys_that_this_reads(tmp_path):
    schedule = {"name": "cosine", "warmup_steps": 2, "final_lr": 1e-5}
    constant = {"players": {"adversary": {"lr_scheduler": {"name": "constant"}}}, "lr_scheduler": schedule}
    player = RunConfig.parse(tokenizer_config(tmp_path / "run", **constant)).player("adversary").lr_scheduler
    assert (player.name, player.warmup_steps, player.final_lr) == ("constant", 2, None)
    still = {"players": {"adversary": {"optimizer": {"lr": 0.0}}}, "lr_scheduler": schedule}
    with pytest.raises(ConfigError, match=r"players\.adversary: .* because optimizer\.lr is 0"):
        RunConfig.parse(tokenizer_config(tmp_path / "run", **still)).player("adversary")


def test_a_model_of_the_hub_is_fetched_once(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(start, "load", lambda path: fetched.append(path) or tiny("vit_vqgan"))
    config, found = start.with_model_of_source(tokenizer_config(tmp_path) | {"model": {}, "init_from": "some/where"})
    (source,) = start.open_starts(RunConfig.parse(config), found)
    assert fetched == ["some/where"]
    assert source.weights().keys() == tiny("vit_vqgan").state_dict().keys()
    assert not found  # so that the weights are freed when they are loaded


def resumed(folder, caplog, **changes) -> list[float]:
    """The losses of a run of six steps that started with another config."""
    caplog.clear()
    with caplog.at_level("WARNING", logger="vistok"):
        return losses_of(train(tokenizer_config(folder, **changes), resume=True))


def test_averaged_weights_can_begin_and_end_with_a_resume(tmp_path, caplog):
    training = {"max_steps": 3, "ema_decay": 0.0}
    folder = train(tokenizer_config(tmp_path / "run", training=training))
    resumed(folder, caplog, training={"ema_decay": 0.9})
    assert "has no averaged weights: they begin at the weights of its step" in caplog.text
    assert "resumed with another training.ema_decay: 0.0 -> 0.9" in caplog.text
    assert "resumed with another training.max_steps: 3 -> 6" in caplog.text
    resumed(folder, caplog, training={"ema_decay": 0.0, "max_steps": 7})
    assert "the checkpoint's averaged weights are left out" in caplog.text


def test_an_adversary_can_begin_and_end_with_a_resume(tmp_path, caplog):
    plain = losses_of(train(tokenizer_config(tmp_path / "plain")))
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
    losses = resumed(folder, caplog, losses={"gan": GAN | {"start_step": 4}})
    assert "has no adversary: it begins afresh" in caplog.text
    assert "resumed with another losses.gan.start_step: absent -> 4" in caplog.text
    assert losses[:3] == pytest.approx(plain[:3], rel=0.2)
    assert "d_loss" in read_metrics(folder / "metrics.jsonl")[-1]
    resumed(folder, caplog, training={"max_steps": 7})
    assert "this run has no adversary: the checkpoint's is left out" in caplog.text
    assert "d_loss" not in read_metrics(folder / "metrics.jsonl")[-1]


def test_another_rate_is_said_and_heeded(tmp_path, caplog):
    config = {"training": {"max_steps": 3, "ema_decay": 0.0}}
    folder = train(tokenizer_config(tmp_path / "run", **config))
    before = weights_of(folder)
    resumed(folder, caplog, optimizer={"lr": 0.0, "weight_decay": 0.1}, training={"ema_decay": 0.0})
    assert "resumed with another optimizer.lr: 0.001 -> 0.0" in caplog.text
    after = weights_of(folder)
    assert all(torch.allclose(after[key], before[key], atol=1e-7) for key in before)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"losses": {"gan": GAN | {"discriminator": {"name": "patchgan", "width": 8, "num_layers": 1}}}},
            "width: 4 -> 8",
        ),
        ({"losses": {"gan": GAN}, "model": {"codebook_size": 64}}, "model.codebook_size: 32 -> 64"),
        ({"losses": {"gan": GAN}, "freeze": ["encoder.*"]}, "freeze: absent -> "),
        ({"losses": {"gan": GAN}, "data": {"batch_size": 8}}, "data.batch_size: 16 -> 8"),
    ],
)
def test_what_cannot_be_resumed_is_told_with_the_way_out(tmp_path, changes, told):
    train(tokenizer_config(tmp_path / "run", losses={"gan": GAN}, training={"max_steps": 1}))
    with pytest.raises(ValueError, match=r"checkpoint|resume the data order") as refused:
        train(tokenizer_config(tmp_path / "run", **changes), resume=True)
    (note,) = refused.value.__notes__
    assert told in note
    assert f"output_dir=… init_from={tmp_path / 'run'}" in note


def test_a_run_at_its_end_says_so(tmp_path, first, caplog):
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
    resumed(folder, caplog, training={"max_steps": 3})
    assert "at step 3 already: nothing is left to train up to training.max_steps 3" in caplog.text
    assert "resumed with another" not in caplog.text


def test_a_checkpoint_of_the_version_before_is_refused_with_the_way_out(tmp_path):
    folder = train(tokenizer_config(tmp_path / "run", training={"max_steps": 3}))
    path = folder / "checkpoints" / "step-0000003" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "players"}, path)
    with pytest.raises(CheckpointError, match=r"earlier version of vistok.*init_from=RUN"):
        train(tokenizer_config(folder), resume=True)
    again = train(tokenizer_config(tmp_path / "again", init_from=str(path.parent), **STILL))
    assert vistok.load(again / "tokenizer")


def test_stage_is_read_as_task(tmp_path, caplog):
    config = tokenizer_config(tmp_path / "run", training={"max_steps": 1})
    config = {"stage": config.pop("task"), **config}
    train(config)
    assert "stage is called task now: task: tokenizer" in caplog.text
    with pytest.raises(ConfigError, match="task: got 'tokeniser', expected one of tokenizer, generator; did you mean"):
        train(config | {"stage": "tokeniser"})
    with pytest.raises(ConfigError, match="task: got None"):
        train({key: value for key, value in config.items() if key != "stage"})
