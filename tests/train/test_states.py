"""The saved states of a module and its optimizer, and what another run takes from them."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from vistok.checkpoints import CheckpointError
from vistok.train.parallel import load_named_state, load_whole_state_dict, named_state, whole_state_dict


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return module, torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))


def move(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        module(torch.linspace(-1, 1, 6).view(2, 3) + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def names(module: nn.Module) -> dict[str, nn.Parameter]:
    return {f"ours.{name}": parameter for name, parameter in module.named_parameters()}


def test_a_state_goes_on_exactly_and_keeps_the_groups_of_the_run():
    module, optimizer = network()
    move(module, optimizer, 2)
    weights, state = whole_state_dict(module), named_state(optimizer, module, names(module))
    assert state.keys() == names(module).keys()
    weights, state = torch.load(_saved({"weights": weights, "state": state}), weights_only=True).values()
    other, others = network()
    others.param_groups[0]["lr"], others.param_groups[1]["weight_decay"] = 0.05, 0.3
    load_whole_state_dict(other, weights, source="the checkpoint")
    load_named_state(others, other, names(other), state)
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in others.param_groups] == [
        (0.05, 0.1, (0.8, 0.9)),
        (0.1, 0.3, (0.8, 0.9)),
    ]
    for optim in (optimizer, others):
        for group in optim.param_groups:
            group["lr"], group["weight_decay"] = 0.1, 0.1
    for run in ((module, optimizer), (other, others)):
        move(*run, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values()))


def _saved(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_saving_an_optimizer_that_has_not_moved_begins_nothing():
    module, optimizer = network()
    before = [p.clone() for p in module.parameters()]
    state = named_state(optimizer, module, names(module))
    assert state == {name: {} for name in names(module)}
    assert not optimizer.state
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(module.parameters(), before))
    load_named_state(optimizer, module, names(module), state)
    assert not any(optimizer.state.values())


def test_what_is_new_begins_afresh_and_the_rest_goes_on():
    module, optimizer = network()
    move(module, optimizer, 3)
    new = "ours.1.bias"
    state = {name: value for name, value in named_state(optimizer, module, names(module)).items() if name != new}
    weights = {key: value for key, value in whole_state_dict(module).items() if key != "1.bias"}
    other, others = network()
    begun = other[1].bias.clone()
    load_whole_state_dict(other, weights, source="the checkpoint", optional={"1.bias"})
    load_named_state(others, other, names(other), state, fresh={new})
    assert torch.equal(other[1].bias, begun)
    assert not others.state.get(other[1].bias)  # no step counts as done
    assert others.state[other[1].weight]["step"] == 3
    with pytest.raises(CheckpointError, match="trains other parameters"):
        load_named_state(others, other, names(other), state)
    with pytest.raises(CheckpointError, match=r"the checkpoint does not fit Sequential; 1 missing: 1\.bias"):
        load_whole_state_dict(other, weights, source="the checkpoint")
