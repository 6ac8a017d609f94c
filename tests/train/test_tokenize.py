"""Tokenizing a data set: the views, their order, and what is stored beside them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import generator_config

import vistok
from vistok.data import (
    Affine,
    DataConfig,
    TokenCache,
    augmented_view_loader,
    evaluation_loader,
    open_source,
)
from vistok.data.loader import TooManyUnreadableError
from vistok.data.transforms import center_crop_adm, ten_crop, to_pixels
from vistok.signatures import ConfigError
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.tokenizers.vit_vqgan import ViTVQGAN
from vistok.train.config import RunConfig
from vistok.train.tasks.generator import GeneratorTask
from vistok.train.tokenize import tokenize
from vistok.utils.outputs import ResumeError
from vistok.utils.processes import Processes

TINY_VIT = {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32}


def tiny_tokenizer(**arguments) -> ViTVQGAN:
    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 8, "codebook_size": 64, "codebook_embed_dim": 4}
    return ViTVQGAN(**{**settings, "encoder": TINY_VIT, "decoder": TINY_VIT, **arguments})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("bird", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            low = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8))
            low.resize((24, 30), Image.Resampling.BICUBIC).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def data(photos: Path) -> DataConfig:
    return DataConfig(image_size=16, root=str(photos), batch_size=3)


def stored(cache: TokenCache, view: int = 0) -> torch.Tensor:
    return cache.batch(np.arange(len(cache)), np.full(len(cache), view))[0]


def encoded(tokenizer, loader) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([tokenizer.encode(batch.pixels) for batch in loader])


def test_the_cache_holds_what_the_tokenizer_makes_of_evaluation_images(data, tmp_path):
    tokenizer = tiny_tokenizer()
    cache = tokenize(tokenizer, dataclasses.replace(data, flip=True, crop="random_resized"), tmp_path / "tokens")
    expected = encoded(tokenizer, evaluation_loader(open_source(data), data))
    assert torch.equal(stored(cache), expected)
    assert len(expected.unique(dim=0)) > 5, "the images must differ for this test to mean anything"
    assert cache.labels.tolist() == [0] * 5 + [1] * 5
    assert cache.classes == ("bird", "cat")
    assert cache.source_fingerprint == open_source(data).fingerprint()


def test_the_cache_carries_its_tokenizer(data, tmp_path):
    tokenizer = tiny_tokenizer()
    cache = tokenize(tokenizer, data, tmp_path / "tokens")
    copy = vistok.load(tmp_path / "tokens" / "tokenizer")
    cache.check_tokenizer(copy.fingerprint())
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert vistok.TokenSpec(**cache.spec) == tokenizer.spec


def test_flip_stores_the_mirror_image_second(data, tmp_path):
    tokenizer = tiny_tokenizer()
    cache = tokenize(tokenizer, data, tmp_path / "tokens", augmentation="flip")
    pixels = torch.cat([batch.pixels for batch in evaluation_loader(open_source(data), data)])
    assert cache.views == 2
    assert torch.equal(stored(cache, 0), tokenizer.encode(pixels))
    assert torch.equal(stored(cache, 1), tokenizer.encode(pixels.flip(-1)))


@pytest.mark.parametrize(("augmentation", "size"), [("ten_crop", 17), ("ten_crop:1.1", 17), ("ten_crop:1.3", 20)])
def test_ten_crop_cuts_from_larger_images(data, tmp_path, augmentation, size):
    tokenizer = tiny_tokenizer()
    cache = tokenize(tokenizer, data, tmp_path / "tokens", augmentation=augmentation)
    source = open_source(data)
    larger = np.stack([np.asarray(center_crop_adm(source[i][0], size)) for i in range(len(source))])
    crops = ten_crop(to_pixels(larger), 16)  # (N, 10, C, H, W)
    assert cache.views == 10
    for view in range(10):
        assert torch.equal(stored(cache, view), tokenizer.encode(crops[:, view]))


def test_a_generator_task_reads_crops_of_two_sizes(data, tmp_path):
    caches = [tokenize(tiny_tokenizer(), data, tmp_path / m, augmentation=f"ten_crop:{m}") for m in ("1.1", "1.3")]
    config = generator_config(tmp_path / "run", "", training={"batch_size": 10})
    config |= {"tokens": [str(cache.folder) for cache in caches], "token_weights": [1, 3]}
    task = GeneratorTask(RunConfig.parse(config), 0, 1)
    (batch,) = task.loader
    views = [cache.batch(batch.indices, [view] * 10)[0] for cache in caches for view in range(10)]
    found = torch.stack([(view == batch.tokens).all(-1) for view in views])  # (20, B)
    assert found.any(0).all()
    assert found[:10].any()
    assert found[10:].any()
    with pytest.raises(ConfigError, match="task generator needs 'tokens'"):
        RunConfig.parse({**config, "tokens": []})


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2}, {"cache": "memory"}, {"batch_size": 10}])
def test_random_views_are_those_of_the_first_epochs(data, tmp_path, changes):
    tokenizer = tiny_tokenizer()
    data = dataclasses.replace(data, crop="random", flip=True, affine=Affine(degrees=20, translate=0.2), seed=5)
    cache = tokenize(tokenizer, dataclasses.replace(data, **changes), tmp_path / "tokens", augmentation="random:3")
    assert cache.views == 3
    for view in range(3):
        expected = encoded(tokenizer, augmented_view_loader(open_source(data), data, view))
        assert torch.equal(stored(cache, view), expected)
    assert not torch.equal(stored(cache, 0), stored(cache, 1))


def test_other_seeds_give_other_random_views(data, tmp_path):
    tokenizer, data = tiny_tokenizer(), dataclasses.replace(data, affine=Affine(translate=0.3))
    first = tokenize(tokenizer, data, tmp_path / "a", augmentation="random:1")
    other = tokenize(tokenizer, dataclasses.replace(data, seed=1), tmp_path / "b", augmentation="random:1")
    assert not torch.equal(stored(first), stored(other))


def test_a_tokenizer_in_training_mode_is_evaluated(data, tmp_path):
    arguments = {"channels": 8, "encoder_channel_mult": (1, 1), "decoder_channel_mult": (1, 1), "res_blocks": 1}
    arguments |= {"z_channels": 8, "codebook_size": 64, "codebook_embed_dim": 4, "norm_groups": 4, "dropout": 0.9}
    tokenizer = LlamaGenVQ(16, **arguments).train()
    cache = tokenize(tokenizer, data, tmp_path / "tokens")
    assert torch.equal(stored(cache), encoded(tokenizer.eval(), evaluation_loader(open_source(data), data)))


def test_residual_ids_and_grey_unlabelled_images(photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.png"):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    tokenizer = tiny_tokenizer(residual_depth=2, in_channels=1)
    data = DataConfig(image_size=16, root=str(flat), channels=1, batch_size=4)
    cache = tokenize(tokenizer, data, tmp_path / "tokens")
    assert stored(cache).shape == (10, 4, 2)
    assert (cache.classes, set(cache.labels.tolist())) == ((), {-1})


def test_another_size_of_a_convolutional_tokenizer(data, tmp_path):
    arguments = {"channels": 8, "encoder_channel_mult": (1, 1), "decoder_channel_mult": (1, 1), "res_blocks": 1}
    tokenizer = LlamaGenVQ(16, z_channels=8, codebook_size=64, codebook_embed_dim=4, norm_groups=4, **arguments)
    cache = tokenize(tokenizer, dataclasses.replace(data, image_size=8), tmp_path / "tokens")
    assert cache.spec["grid"] == [4, 4]
    assert stored(cache).shape == (10, 16)
    with pytest.raises(ValueError, match=r"data\.image_size is 9, .*built for 16x16: set data\.image_size=16"):
        tokenize(tokenizer, dataclasses.replace(data, image_size=9), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "augmentation", "message"),
    [
        ({"image_size": 32}, "none", r"data\.image_size is 32, .*built for 16x16: set data\.image_size=16"),
        ({"channels": 1}, "none", r"reads 3 channels; set data\.channels=3, not 1"),
        ({}, "tencrop", r"unknown augmentation 'tencrop'; did you mean 'ten_crop'\? Known: none, flip"),
        ({}, "ten_crop:", "must grow by a factor above 1, at most 4, for example ten_crop:1.05"),
        ({}, "ten_crop:1", "must grow by a factor above 1"),
        ({}, "ten_crop:inf", "must grow by a factor above 1"),
        ({}, "ten_crop:1.05", "a margin of 1.05 adds no pixel to 16"),
        ({}, "random", "random needs a number of views"),
        ({}, "random:0", "random needs a number of views"),
        ({}, "random:4", r"would store 4 equal views: set data\.flip=true"),
    ],
)
def test_bad_requests_leave_nothing_behind(data, tmp_path, changes, augmentation, message):
    with pytest.raises(ValueError, match=message):
        tokenize(tiny_tokenizer(), dataclasses.replace(data, **changes), tmp_path / "new", augmentation=augmentation)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_an_existing_folder_is_refused_before_any_work(data, tmp_path):
    (tmp_path / "tokens").mkdir()
    with pytest.raises(FileExistsError, match="exists already; choose another folder"):
        tokenize(tiny_tokenizer(), data, tmp_path / "tokens")


def test_too_many_damaged_images_leave_nothing_behind(data, photos, tmp_path):
    (photos / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="1 of 10 samples cannot be read"):
        tokenize(tiny_tokenizer(), data, tmp_path / "tokens", augmentation="flip")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_few_damaged_images_are_left_out_of_every_view(photos, tmp_path, caplog):
    good = Image.open(photos / "cat" / "1.png").copy()
    for number in range(110):
        good.rotate(3 * number).save(photos / "cat" / f"more-{number:03d}.png")
    (photos / "cat" / "more-000.png").write_bytes(b"not an image")
    data = DataConfig(image_size=16, root=str(photos), flip=True, batch_size=40)
    with caplog.at_level(logging.WARNING):
        cache = tokenize(tiny_tokenizer(), data, tmp_path / "tokens", augmentation="random:2")
    assert len(cache) == 119
    assert "more-000.png" in caplog.text


@pytest.fixture
def many(tmp_path: Path) -> DataConfig:
    """121 images, of which three shards of 40 hold all but the last."""
    rng = np.random.default_rng(0)
    (tmp_path / "many").mkdir()
    for number in range(121):
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / "many" / f"{number:03d}.png")
    return DataConfig(image_size=16, root=str(tmp_path / "many"), batch_size=20)


def damage(data: DataConfig, *numbers: int) -> None:
    for number in numbers:
        (Path(data.root) / f"{number:03d}.png").write_bytes(b"not an image")


def test_a_shard_may_be_wholly_unreadable(many, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vistok.train.tokenize.SHARD_SIZE", 40)
    damage(many, 120)
    with caplog.at_level(logging.WARNING):
        cache = tokenize(tiny_tokenizer(), many, tmp_path / "tokens", augmentation="flip")
    assert "1 images could not be read and have no tokens" in caplog.text
    assert json.loads((tmp_path / "tokens" / "index.json").read_text())["shards"] == [40, 40, 40, 0]
    assert list(json.loads((tmp_path / "tokens" / "unreadable-00003.json").read_text())) == ["120"]
    assert stored(cache, 1).shape == (120, 4)


def test_unreadable_images_count_over_interruptions(many, tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.train.tokenize.SHARD_SIZE", 40)
    damage(many, 30, 90)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tiny_tokenizer(), many, tmp_path / "tokens")
    for _ in range(2):  # once more when all shards are there
        with pytest.raises(TooManyUnreadableError, match=r"(?s)2 of 121 samples .*030\.png.*090\.png") as caught:
            tokenize(tiny_tokenizer(), many, tmp_path / "tokens", resume=True)
        assert "remove" in caught.value.__notes__[0]
        assert "--resume" not in caught.value.__notes__[0]
    assert not (tmp_path / "tokens").exists()


def test_unreadable_images_count_over_processes(many, tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.train.tokenize.SHARD_SIZE", 40)
    damage(many, 30, 50)  # in shards of different processes
    barrier = threading.Barrier(2)
    monkeypatch.setattr(Processes, "wait", lambda self: barrier.wait())

    def run(index: int) -> None:
        try:
            tokenize(tiny_tokenizer(), many, tmp_path / "tokens", processes=Processes(index, 2))
        finally:
            barrier.abort()  # as a launcher does with all processes when one fails

    with ThreadPoolExecutor() as pool:
        errors = [future.exception() for future in [pool.submit(run, index) for index in range(2)]]
    assert any(isinstance(error, TooManyUnreadableError) for error in errors)
    assert not (tmp_path / "tokens").exists()


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("vistok.train.tokenize.SHARD_SIZE", 4)


def interrupt_at(patch, count: int) -> None:
    """Let the encoder fail after so many batches."""
    encode, seen = ViTVQGAN.encode, []

    def dies(self, pixels, **options):
        seen.append(1)
        if len(seen) > count:
            raise KeyboardInterrupt
        return encode(self, pixels, **options)

    patch.setattr(ViTVQGAN, "encode", dies)


def test_a_killed_run_goes_on_with_the_shards_it_has(data, tmp_path, small_shards, monkeypatch):
    tokenizer, data = tiny_tokenizer(), dataclasses.replace(data, affine=Affine(translate=0.3))
    tokenize(tokenizer, data, tmp_path / "whole", augmentation="random:2")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)  # two batches of two views, each, make a shard
        with pytest.raises(KeyboardInterrupt) as caught:
            tokenize(tokenizer, data, tmp_path / "part", augmentation="random:2")
    assert "go on with --resume" in caught.value.__notes__[0]
    assert not (tmp_path / "part").exists()
    left = tmp_path / "part.unfinished"
    assert (left / "labels-00000.npy").exists()
    (left / ".tokens-00001.npy.x.partial").write_bytes(b"half")
    with pytest.raises(FileExistsError, match="did not finish; go on with --resume"):
        tokenize(tokenizer, data, tmp_path / "part", augmentation="random:2")
    with pytest.raises(ResumeError, match=r"another .*augmentation was 'random:2' and is now 'flip'"):
        tokenize(tokenizer, data, tmp_path / "part", augmentation="flip", resume=True)
    other = tiny_tokenizer(codebook_embed_dim=8)
    with pytest.raises(ResumeError, match=r"begun with another .*tokenizer"):
        tokenize(other, data, tmp_path / "part", augmentation="random:2", resume=True)
    first = (left / "tokens-00000.npy").stat().st_mtime_ns
    faster = dataclasses.replace(data, batch_size=2, num_workers=1)
    tokenize(tokenizer, faster, tmp_path / "part", augmentation="random:2", resume=True)
    assert (tmp_path / "part" / "tokens-00000.npy").stat().st_mtime_ns == first
    assert same_files(tmp_path / "part", tmp_path / "whole")
    assert not left.exists()


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(ResumeError, match="nothing to resume"):
        tokenize(tiny_tokenizer(), data, tmp_path / "tokens", resume=True)


def test_two_processes_write_what_one_writes(data, tmp_path, small_shards):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenize(tokenizer, data, tmp_path / "one", augmentation="flip")
    program = "import vistok.train.tokenize as t; t.SHARD_SIZE = 4; from vistok.cli import main; main()"
    (tmp_path / "program.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["tokenize", str(tmp_path / "tokenizer"), f"data.root={data.root}", "--augmentation", "flip"]
    command = [*launch, str(tmp_path / "program.py"), *arguments, "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vistok.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("10 images in 2 views each") == 1
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "two").glob("tokens-*.npy"))) == 3
