"""Images with a target of the same name in another folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import tokenizer_config

from vistok.data import DataConfig
from vistok.data.loader import evaluation_loader, training_loader
from vistok.data.opening import open_source
from vistok.train import train


def write(path, value: int, size: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path):
    """Generated PNGs, and real JPEGs of the same names, of which there are more."""
    for number in range(8):
        write(tmp_path / "generated" / f"class{number % 2}" / f"{number}.png", 10 * number)
        write(tmp_path / "real" / f"class{number % 2}" / f"{number}.jpg", 100 + 10 * number, size=24)
    write(tmp_path / "real" / "class0" / "more.jpg", 255)
    return tmp_path


def config(folders, **changes) -> DataConfig:
    given = {"root": str(folders / "generated"), "target_root": str(folders / "real"), "batch_size": 2}
    return DataConfig(16, **given | changes)


@pytest.mark.parametrize("changes", [{}, {"cache": "memory"}, {"limit": 4}, {"split": None}])
def test_targets_are_the_images_of_the_same_name(folders, changes):
    data = config(folders, **changes)
    seen = 0
    for batch in training_loader(open_source(data), data):
        levels = (batch.pixels.mean((1, 2, 3)) + 1) * 127.5
        targets = (batch.target.mean((1, 2, 3)) + 1) * 127.5
        torch.testing.assert_close(targets, levels + 100, atol=2, rtol=0)
        assert batch.target.shape == batch.pixels.shape
        seen += len(batch.indices)
    assert seen == (data.limit or 8)


def test_a_pair_without_a_readable_target_is_left_out(folders):
    (folders / "real" / "class1" / "3.jpg").write_bytes(b"no image")
    data = config(folders, batch_size=8)
    reader = evaluation_loader(open_source(data), data).reader
    batch, failures = reader.load(np.arange(8), 0)
    assert len(batch.pixels) == len(batch.target) == len(batch.labels) == 7
    assert len(failures) == 1


def test_what_cannot_be_paired_is_said(folders):
    (folders / "real" / "class1" / "3.jpg").unlink()
    data = config(folders)
    with pytest.raises(ValueError, match="1 of 8 images have no target of their name, such as class1/3"):
        training_loader(open_source(data), data)
    data = config(folders, flip=True)
    with pytest.raises(ValueError, match=r"no data\.flip"):
        training_loader(open_source(data), data)
    with pytest.raises(ValueError, match="target_root pairs files of folders"):
        DataConfig(16, source="digits", target_root="real")


def test_a_run_learns_the_targets(folders):
    section = {"source": "folder", "root": str(folders / "generated"), "target_root": str(folders / "real")}
    run = tokenizer_config(folders / "run", training={"max_steps": 2, "save_every": 0})
    run["data"] = {"image_size": 16, "batch_size": 8} | section
    assert (train(run) / "tokenizer").is_dir()
