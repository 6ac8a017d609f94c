"""Training states that were edited by hand: whole files whose parts are not what this run saves."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_runs import GAN, tokenizer_config

from vistok.checkpoints import CheckpointError
from vistok.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = "checkpoints/step-0000002/state.pt"
BIAS, CODES = "to_patches.bias", 32


def config(folder: Path, steps: int) -> dict:
    return tokenizer_config(
        folder,
        data={"limit": 32, "batch_size": 8},
        losses={"gan": GAN | {"start_step": 0}},
        training={"max_steps": steps, "log_every": 4, "save_every": 2, "image_every": 0, "mixed_precision": "no"},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    train(config(folder, 2))
    return folder


def with_part(state: dict, path: tuple, value: object) -> dict:
    state = copy.deepcopy(state)
    part = state
    for key in path[:-1]:
        part = part[key]
    if value is ABSENT:
        del part[path[-1]]
    else:
        part[path[-1]] = value(part[path[-1]]) if callable(value) else value
    return state


ABSENT = object()
MOMENTS = ("players", "model", "optimizer", BIAS)
EDITS = [
    (("players",), "text"),
    (("players", "model"), None),
    (("players", "adversary", "optimizer"), []),
    (("model", BIAS), lambda tensor: tensor.to_sparse()),
    (("model", BIAS), lambda tensor: tensor.to("meta")),
    (("average", "model", BIAS), lambda tensor: tensor.to_sparse()),
    (("average", "updates"), "many"),
    (("average", "updates"), -1),
    (MOMENTS, ABSENT),
    (MOMENTS, "text"),
    ((*MOMENTS, "step"), []),
    ((*MOMENTS, "step"), float("inf")),
    ((*MOMENTS, "exp_avg"), lambda tensor: tensor[:3]),
    ((*MOMENTS, "exp_avg"), lambda tensor: tensor.to(torch.complex64)),
    ((*MOMENTS, "exp_avg_sq"), lambda tensor: tensor * torch.nan),
    ((*MOMENTS, "exp_avg_sq"), ABSENT),
    ((*MOMENTS, "surplus"), torch.zeros(())),
    (("loader",), None),
    (("loader", "epoch"), 0.5),
    (("loader", "position"), -1),
    (("loader", "position"), True),
    (("loader", "failures"), {1: 2}),
    (("meter",), {}),
    (("meter", "sums"), {"loss": 1.0}),
    (("meter", "sums", "loss"), torch.zeros(3, 5)),
    (("meter", "counts", "loss"), "two"),
    (("meter", "counts", "loss"), 0),
    (("task",), []),
    (("task", "codebook", "counts"), lambda counts: counts[:3]),
    (("task", "codebook", "counts"), lambda counts: counts.float()),
    (("task", "codebook", "watch", "low_since"), "never"),
    (("task", "codebook", "watch", "warned"), 1),
    (("row",), "text"),
    (("judged_by",), {"psnr": "good"}),
]


@pytest.mark.parametrize(("path", "value"), EDITS)
def test_a_part_of_another_kind_is_refused_with_the_way_on(path, value, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    file = tmp_path / "run" / STATE
    torch.save(with_part(torch.load(file, weights_only=True), path, value), file)
    before = file.stat().st_mtime_ns
    with pytest.raises(CheckpointError) as caught:
        train(config(tmp_path / "run", 3), resume=True)
    told = " ".join((str(caught.value), *getattr(caught.value, "__notes__", ())))
    assert f"Remove the folder {file.parent}" in told
    assert len(told) < 1500
    assert file.stat().st_mtime_ns == before


def test_a_state_that_was_saved_anew_goes_on(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    file = tmp_path / "run" / STATE
    torch.save(torch.load(file, weights_only=True), file)
    train(config(tmp_path / "run", 3), resume=True)
    assert (tmp_path / "run" / "checkpoints" / "step-0000003").is_dir()
