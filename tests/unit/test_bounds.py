"""Sizes beyond the machine are refused before anything of them is allocated."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vistok.checkpoints import registry
from vistok.checkpoints.bounds import MOST, OversizedError, construct, integers
from vistok.types import to_json

MEMORY = 2**26


class Allocations(TorchFunctionMode):
    """Records the largest tensor with values that a torch function returned."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "cpu":
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def changed(arguments: dict[str, Any], place: str, value: int) -> dict[str, Any]:
    copy = json.loads(json.dumps(arguments))
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    inner = copy
    for key in path:
        inner = inner[key]
    inner[last] = value
    return copy


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=MEMORY))


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("name", [entry.name for entry in registry.ENTRIES])
def test_no_large_size_of_any_system_is_allocated(name: str):
    model_class = registry.entry(name).load()
    tiny = to_json(dict(model_class.tiny))
    places = sorted(integers(tiny), key=lambda item: item[1], reverse=True)[:4]
    refused = 0
    for place, _ in places:
        with Allocations() as seen:
            try:
                construct(model_class, changed(tiny, place, 10**8))
            except OversizedError:
                refused += 1
            except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError):
                pass  # sizes that do not go together
        assert seen.largest < MEMORY, place
    assert refused


@pytest.mark.parametrize("word", MOST)
def test_counts_have_a_bound(word: str):
    with pytest.raises(OversizedError, match=rf"a.num_{word} is {MOST[word] + 1}, beyond .* \(at most "):
        construct(nn.Identity, {"a": {f"num_{word}": MOST[word] + 1}})


class Table(nn.Module):
    """Reads tensor values while it is built, and holds a buffer."""

    def __init__(self, size: int, read: bool):
        super().__init__()
        self.register_buffer("table", torch.zeros(size))
        self.first = float(torch.ones(1)) if read else 1.0


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("read", [False, True])
def test_buffers_count_and_what_reads_numbers_is_built(read: bool):
    assert construct(Table, {"size": 3, "read": read}).table.tolist() == [0, 0, 0]
    with pytest.raises(OversizedError, match="GiB of weights"):
        construct(Table, {"size": 10**8, "read": read})


def test_the_first_look_draws_nothing():
    states = []
    for build in (lambda: nn.Linear(3, 2), lambda: construct(nn.Linear, {"in_features": 3, "out_features": 2})):
        torch.manual_seed(0)
        states.append((build().weight.tolist(), torch.rand(2).tolist()))
    assert states[0] == states[1]
