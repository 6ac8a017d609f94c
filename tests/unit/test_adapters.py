"""Files of low-rank adapters."""

from __future__ import annotations

import pytest
import torch

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.adapters import save_adapter, with_adapter


def state(**scales: float) -> dict[str, torch.Tensor]:
    found = {}
    for name, scale in scales.items():
        prefix = f"{name}.parametrizations.weight."
        found |= {f"{prefix}original": torch.zeros(4, 3), f"{prefix}0.scale": torch.tensor(scale)}
        found |= {f"{prefix}0.down": torch.ones(2, 3), f"{prefix}0.up": torch.ones(4, 2)}
    return found


def test_an_adapter_of_one_scale_is_read_as_written(tmp_path):
    save_adapter(tmp_path, state(a=0.5, b=0.5), "base")
    merged = with_adapter({"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(4, 3)}, tmp_path)
    assert torch.equal(merged["b.weight"], torch.ones(4, 3))


def test_adapters_of_several_scales_are_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"one rank and one scale; these have rank 2, scale 0\.5; rank 2, scale 1"
    ):
        save_adapter(tmp_path, state(a=0.5, b=1.0), "base")
    assert not list(tmp_path.iterdir())
