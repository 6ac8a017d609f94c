"""Numbers that are given to pipelines: whole, finite and bounded, and those of NumPy are read like Python's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_models import tiny

from vistok.pipelines import Pipeline
from vistok.pipelines.samples import write_samples
from vistok.signatures import ConfigError
from vistok.train.tokenize import parse_augmentation


@pytest.mark.parametrize(
    "request_",
    [
        {"num_images": True},
        {"num_images": 10**12},
        {"num_images": 2**63},
        {"num_images": None, "class_labels": 0, "num_images_per_label": 10**12},
        {"num_images": 1, "seed": 2**64},
        {"num_images": 1, "seed": -(2**63) - 1},
        {"num_images": 1, "seed": True},
        {"num_images": 1, "index_start": None},
        {"num_images": 1, "index_start": 2**64},
        {"num_images": 1, "batch_size": None},
        {"num_images": 1, "batch_size": True},
    ],
)
def test_numbers_of_a_request_are_whole_and_bounded(request_):
    pipe = Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt"))
    with pytest.raises(ValueError, match=r"must be (a whole number|at most|at least)"):
        pipe(**request_)


def test_numbers_of_numpy_are_numbers():
    pipe = Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt"))
    given = {"num_images": np.int64(2), "seed": np.int32(3), "top_k": np.int64(5), "temperature": np.float32(1.0)}
    same = {key: value.item() for key, value in given.items()}
    assert torch.equal(pipe(**given).tokens, pipe(**same).tokens)
    with pytest.raises(ConfigError, match="top_k: got"):
        pipe(num_images=1, top_k=np.bool_(True))


def test_a_folder_of_absurdly_many_samples_is_refused_at_once(tmp_path):
    pipe = Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt"))
    for number in (0, -1, 10**12, True):
        with pytest.raises(ValueError, match="the number of images must be"):
            write_samples(pipe, tmp_path / "out", number)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["random:0", "random:10000", "random:²", "random:" + "9" * 5000, "ten_crop:1e3"])
def test_absurd_views_are_refused(name):
    with pytest.raises(ValueError, match=r"from 1 to 1,000|at most 4"):
        parse_augmentation(name)
