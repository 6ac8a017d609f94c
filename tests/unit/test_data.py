"""Images: sources, transforms, and batches that depend on seed, epoch and position alone."""

from __future__ import annotations

import logging
import multiprocessing
import struct
import time
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.images import assert_same_batches, fill_folder, picture

from vistok.data import (
    Affine,
    DataConfig,
    ImageTransform,
    InMemory,
    Loader,
    SequentialOrder,
    ShuffledOrder,
    augmented_view_loader,
    center_crop_adm,
    evaluation_loader,
    open_source,
    ten_crop,
    to_pixels,
    training_loader,
)
from vistok.data.loader import TooManyUnreadableError
from vistok.data.sources import UnreadableImageError
from vistok.data.transforms import random_affine, random_crop, random_resized_crop, squash
from vistok.draws import Keys
from vistok.train.tasks.images import example_batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill_folder(tmp_path / "images", {"cat": 14, "ant": 9})


def config(root: Path | None = None, **changes) -> DataConfig:
    return DataConfig(**{"image_size": 8, "root": None if root is None else str(root), "batch_size": 5, **changes})


def open_folder(root: Path, **changes):
    return open_source(config(root, **changes))


# Sources


def test_class_folders(folder: Path):
    source = open_folder(folder)
    assert source.classes == ("ant", "cat")
    assert [source[index][1] for index in (0, 8, 9, 22)] == [0, 0, 1, 1]
    assert source.name(9) == f"{folder}/cat/000.png"
    assert np.array_equal(np.asarray(source[10][0]), np.asarray(picture(1)))


def test_flat_folder_is_unconditional_whatever_the_extensions_case(tmp_path: Path):
    for name in ("b.PNG", "a.JpEg", "c.webp", "d.bmp", "e.jpg"):
        picture(0).save(tmp_path / name)
    source = open_folder(tmp_path)
    assert source.classes == ()
    assert [source[index][1] for index in range(len(source))] == [-1] * 5


def test_splits_are_picked_by_name(tmp_path: Path):
    fill_folder(tmp_path / "train", {"ant": 3, "cat": 2})
    fill_folder(tmp_path / "val", {"ant": 1, "cat": 1})
    assert len(open_folder(tmp_path)) == 5
    assert len(open_folder(tmp_path, split="val")) == 2
    assert open_folder(tmp_path, split=None).classes == ("train", "val")
    with pytest.raises(FileNotFoundError, match="no images in test/; it has train, val"):
        open_folder(tmp_path, split="test")


def test_a_class_may_be_called_train(tmp_path: Path):
    assert open_folder(fill_folder(tmp_path, {"boat": 1, "train": 1})).classes == ("boat", "train")


def test_undivided_folder_has_no_test_split(folder: Path):
    with pytest.raises(FileNotFoundError, match="not divided into splits, so it has no 'test'"):
        open_folder(folder, split="test")


@pytest.mark.parametrize("wrapper", ["", "cifar/"])
def test_zip_reads_like_the_folder_it_holds(tmp_path: Path, wrapper: str):
    root = fill_folder(tmp_path / "images" / "train", {"ant": 3, "cat": 2}).parent
    fill_folder(root / "test", {"ant": 1, "cat": 1})
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, wrapper + file.relative_to(root).as_posix())
        archive.writestr(f"__MACOSX/{wrapper}train/ant/._000.png", b"junk")
    for split in ("train", "test"):
        zipped, plain = (open_folder(path, split=split) for path in (tmp_path / "images.zip", root))
        assert zipped.classes == plain.classes == ("ant", "cat")
        assert zipped.fingerprint() == plain.fingerprint()
        pairs = [(zipped[index], plain[index]) for index in range(len(plain))]
        assert all(a[1] == b[1] and a[0].tobytes() == b[0].tobytes() for a, b in pairs)


def test_zip_is_read_by_several_workers_at_once(tmp_path: Path, folder: Path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder).as_posix())
    source = open_folder(tmp_path / "images.zip")
    source[0]  # the parent's handle is open before the workers fork
    batches = list(evaluation_loader(source, config(num_workers=3, batch_size=2)))
    expected = list(evaluation_loader(open_folder(folder), config(batch_size=2)))
    assert_same_batches(batches, expected)


def test_other_files_are_named_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / ".DS_Store").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert len(open_folder(folder)) == 23
    assert "1 other file is ignored: ant/notes.txt" in caplog.text


def test_bad_roots_name_the_path_and_what_is_accepted(tmp_path: Path, folder: Path):
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/nowhere/deep .the nearest .* {tmp_path}"):
        open_folder(tmp_path / "nowhere" / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty; accepted layouts: <class>/.*\.webp"):
        open_folder(tmp_path / "empty")
    picture(0).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"1 images \(such as loose.png\) beside the folders ant, cat"):
        open_folder(folder)
    with pytest.raises(ValueError, match=r"neither a folder nor a \.zip"):
        open_folder(folder / "loose.png")
    with pytest.raises(ValueError, match=r"data\.source=folder needs data\.root="):
        open_source(config())


def test_channels(tmp_path: Path):
    picture(0).save(tmp_path / "a.png")
    picture(1, mode="L").save(tmp_path / "b.png")
    deep = np.full((10, 12), 0x8042, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "c.png")
    grey, color = open_folder(tmp_path, channels=1), open_folder(tmp_path, channels=3)
    assert {grey[index][0].mode for index in range(3)} == {"L"}
    assert {color[index][0].mode for index in range(3)} == {"RGB"}
    assert np.asarray(grey[2][0]).max() == np.asarray(grey[2][0]).min() == 0x80
    batch = next(iter(evaluation_loader(grey, config(channels=1))))
    assert batch.pixels.shape == (3, 1, 8, 8)


def test_limit_keeps_every_class(folder: Path):
    source = open_folder(folder, limit=4)
    assert len(source) == 4
    assert {source[index][1] for index in range(4)} == {0, 1}
    assert source.fingerprint() != open_folder(folder).fingerprint()


def test_fingerprint_follows_names_and_sizes_not_the_place(tmp_path: Path):
    first, second = (fill_folder(tmp_path / name, {"ant": 2}) for name in ("one", "two"))
    assert open_folder(first).fingerprint() == open_folder(second).fingerprint()
    picture(9).save(second / "ant" / "009.png")
    assert open_folder(first).fingerprint() != open_folder(second).fingerprint()


def test_digits():
    train, test, both = (
        open_source(config(source="digits", channels=1, split=split)) for split in ("train", "test", None)
    )
    assert (len(train), len(test), len(both)) == (1433, 364, 1797)
    assert not {train.name(index) for index in range(len(train))} & {test.name(index) for index in range(len(test))}
    assert np.bincount([label for _, label in test]).min() >= 35
    image = np.asarray(train[0][0])
    assert image.shape == (32, 32)
    assert image.dtype == np.uint8
    assert image.max() > 230
    assert train.classes == tuple("0123456789")
    assert open_source(config(source="digits", channels=3))[0][0].mode == "RGB"
    with pytest.raises(ValueError, match="splits 'train' and 'test'"):
        open_source(config(source="digits", split="val"))


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


def test_torchvision_dataset(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path, images, np.array([3, 1, 0, 9], dtype=np.uint8))
    source = open_source(config(tmp_path, source="torchvision", name="MNIST", split="test", channels=1))
    assert len(source.classes) == 10
    assert [source[index][1] for index in range(4)] == [3, 1, 0, 9]
    assert np.array_equal(np.asarray(source[2][0]), images[2])
    assert source.name(2) == "MNIST/test[2]"


def test_torchvision_errors(tmp_path: Path):
    def refused(error: type[Exception], message: str, **changes) -> None:
        with pytest.raises(error, match=message):
            open_source(config(tmp_path, source="torchvision", **changes))

    refused(ValueError, r"needs data\.name=")
    refused(ValueError, "no dataset 'cifar10'; did you mean 'CIFAR10'", name="cifar10")
    refused(ValueError, "CIFAR10 has the splits 'train' and 'test', got 'val'", name="CIFAR10", split="val")
    refused(FileNotFoundError, f"CIFAR10 is not usable in {tmp_path} .*set data.download=true", name="CIFAR10")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, or null"),
        ({"channels": 2}, "channels must be 1"),
    ],
)
def test_config_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_affine_config_refuses():
    with pytest.raises(ValueError, match="translate and scale must lie in"):
        Affine(translate=1.0)
    with pytest.raises(ValueError, match=r"degrees must lie in 0\.\.180, got -3"):
        Affine(degrees=-3)


# Transforms

unit = st.floats(0, 1, exclude_max=True, width=32)


@given(width=st.integers(4, 70), height=st.integers(4, 70), uniforms=st.tuples(unit, unit, unit))
def test_every_crop_has_the_size_asked_for(width: int, height: int, uniforms: tuple[float, float, float]):
    image = picture(0, (width, height))
    crops = (center_crop_adm(image, 8), random_crop(image, 8, uniforms[1:]), squash(image, 8))
    assert all(crop.size == (8, 8) for crop in (*crops, random_resized_crop(image, 8, uniforms)))


def test_random_crops_reach_every_edge():
    image = picture(0, (20, 8))
    left, right = random_crop(image, 8, (0.0, 0.0)), random_crop(image, 8, (0.999, 0.999))
    assert left.tobytes() == image.crop((0, 0, 8, 8)).tobytes()
    assert right.tobytes() == image.crop((12, 0, 20, 8)).tobytes()
    wide = random_resized_crop(image, 8, (0.999, 0.0, 0.0))  # short side 10 = 8 / 0.8
    assert wide.tobytes() == image.resize((25, 10), Image.Resampling.BICUBIC).crop((0, 0, 8, 8)).tobytes()


def test_pixels_cover_minus_one_to_one_and_come_back():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = to_pixels(values)
    assert pixels.shape == (1, 1, 16, 16)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    back = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(back, torch.from_numpy(values).permute(0, 3, 1, 2))


def test_ten_crop():
    pixels = torch.arange(2 * 5 * 6).reshape(2, 1, 5, 6)
    crops = ten_crop(pixels, 4)
    assert crops.shape == (2, 10, 1, 4, 4)
    assert torch.equal(crops[:, 1], pixels[..., :4, 2:])
    assert torch.equal(crops[:, 2], pixels[..., 1:, :4])
    assert torch.equal(crops[:, 4], pixels[..., :4, 1:5])
    assert torch.equal(crops[:, 5], pixels.flip(-1)[..., :4, :4])
    with pytest.raises(ValueError, match="cannot cut 6 x 6 out of images of 5 x 6"):
        ten_crop(pixels, 6)


def test_affine_moves_turns_and_scales_as_told():
    pixels = torch.full((1, 1, 8, 8), -1.0)
    pixels[..., 2, 5] = 1.0
    middle = torch.full((1, 4), 0.5)

    def changed(affine: Affine, position: int) -> torch.Tensor:
        uniforms = middle.clone()
        uniforms[:, position] = 1.0
        return random_affine(pixels, affine, uniforms)

    assert torch.allclose(random_affine(pixels, Affine(30, 0.2, 0.2), middle), pixels, atol=1e-5)
    assert torch.allclose(changed(Affine(translate=0.25), 2), pixels.roll(2, dims=-1), atol=1e-5)
    assert torch.allclose(changed(Affine(translate=0.25), 3), pixels.roll(2, dims=-2), atol=1e-5)
    assert torch.allclose(changed(Affine(degrees=90), 0), pixels.rot90(-1, (-2, -1)), atol=1e-4)
    assert (changed(Affine(scale=0.5), 1) + 1).sum() > 1.5 * (pixels + 1).sum()


# Order


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_ranks_partition_an_epoch(length: int, batch_size: int, world_size: int, epoch: int):
    sequential = [SequentialOrder(length, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = np.concatenate([batch for order in sequential for batch in order.batches(epoch)] or [[]])
    assert sorted(seen) == list(range(length))
    if length < batch_size * world_size:
        with pytest.raises(ValueError, match=f"{length} samples do not fill one batch of {batch_size}"):
            ShuffledOrder(length, batch_size, world_size=world_size)
        return
    shuffled = [ShuffledOrder(length, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = np.concatenate([order.batches(epoch).ravel() for order in shuffled])
    assert len(set(seen)) == len(seen) == length // (batch_size * world_size) * batch_size * world_size
    assert set(seen) <= set(range(length))


def test_a_step_sees_the_same_samples_on_any_number_of_ranks():
    alone = ShuffledOrder(50, 6).batches(1)
    pair = [ShuffledOrder(50, 3, rank=rank, world_size=2).batches(1) for rank in range(2)]
    assert np.array_equal(np.concatenate(pair, axis=1), alone)


def test_order_changes_with_epoch_and_seed():
    orders = [ShuffledOrder(50, 50, seed).batches(epoch)[0].tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(map(tuple, orders))) == 3


def test_rank_out_of_range():
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1 \(world_size 2\), got 2"):
        SequentialOrder(5, 2, rank=2, world_size=2)


# Loader

AUGMENTED = {"crop": "random_resized", "flip": True, "affine": Affine(10, 0.1, 0.1)}


def by_index(batches: list) -> dict[int, torch.Tensor]:
    return {int(index): pixels for batch in batches for index, pixels in zip(batch.indices, batch.pixels)}


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_batches_do_not_depend_on_workers_or_cache(folder: Path, num_workers: int, cache: str):
    source = open_folder(folder)
    loader = training_loader(source, config(num_workers=num_workers, cache=cache, **AUGMENTED))
    expected = training_loader(source, config(**AUGMENTED))
    for _ in range(2):  # epochs
        assert_same_batches(list(loader), list(expected))


@pytest.mark.parametrize("crop", ["center", "random", "random_resized", "resize"])
def test_a_sample_does_not_depend_on_the_batch_it_lies_in(folder: Path, crop: str):
    source = open_folder(folder)
    changes = {**AUGMENTED, "crop": crop}
    expected = by_index(augmented_view_loader(source, config(batch_size=23, **changes), view=0))
    for batch_size in (1, 4):
        got = by_index(training_loader(source, config(batch_size=batch_size, **changes)))
        assert all(torch.equal(pixels, expected[index]) for index, pixels in got.items())


def test_epochs_augment_differently_and_seeds_too(folder: Path):
    source = open_folder(folder)
    views = [by_index(augmented_view_loader(source, config(**AUGMENTED), view)) for view in (0, 1)]
    views.append(by_index(augmented_view_loader(source, config(seed=1, **AUGMENTED), 0)))
    for index in range(len(source)):
        assert not torch.equal(views[0][index], views[1][index])
        assert not torch.equal(views[0][index], views[2][index])


def test_evaluation_is_plain_complete_and_in_order(folder: Path):
    source = open_folder(folder)
    loader = evaluation_loader(source, config(**AUGMENTED))
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 3]
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
        assert torch.equal(batches[0].pixels[1], to_pixels(np.asarray(center_crop_adm(picture(1), 8))[None])[0])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_resumed_training_continues_the_uninterrupted_one(folder: Path, num_workers: int, stop: int):
    def batches(loader: Loader, state: dict | None = None):
        if state is not None:
            loader.load_state_dict(state)
        while True:
            yield from loader

    settings = config(num_workers=num_workers, **AUGMENTED)
    source = open_folder(folder)
    uninterrupted = batches(training_loader(source, settings))
    expected = [next(uninterrupted) for _ in range(10)]
    first = training_loader(source, settings)
    running = batches(first)
    begun = [next(running) for _ in range(stop)]
    state = first.state_dict()
    resumed = batches(training_loader(source, settings), state)
    assert_same_batches(begun + [next(resumed) for _ in range(10 - stop)], expected)


def test_a_loop_that_breaks_off_begins_its_epoch_anew(folder: Path):
    loader = training_loader(open_folder(folder), config(num_workers=1))
    first = next(iter(loader))
    assert_same_batches([next(iter(loader))], [first])


def test_workers_end_with_their_loader(folder: Path):
    loader = training_loader(open_folder(folder), config(num_workers=1))
    next(iter(loader))
    gone = weakref.ref(loader)
    del loader
    assert gone() is None  # at once, not at the next garbage collection


def test_state_of_other_data_is_refused(folder: Path):
    source = open_folder(folder)
    state = training_loader(source, config()).state_dict()
    with pytest.raises(ValueError, match="global_batch_size was 5, now 4"):
        training_loader(source, config(batch_size=4)).load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        training_loader(source, config(seed=1)).load_state_dict(state)


def test_what_is_no_image_is_told_without_python_objects(tmp_path: Path):
    root = fill_folder(tmp_path, {"ant": 2})
    (root / "ant" / "001.png").write_bytes(b"nope")
    with pytest.raises(
        UnreadableImageError, match=r"001\.png: no image that can be read; empty, damaged, or of another"
    ):
        open_folder(root)[1]


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_damaged_file_is_left_out_and_named_once(tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture):
    root = fill_folder(tmp_path, {"ant": 101})
    whole = (root / "ant" / "007.png").read_bytes()
    (root / "ant" / "007.png").write_bytes(whole[: len(whole) // 2])
    source = open_folder(root)
    with pytest.raises(UnreadableImageError, match=r"007\.png: "):
        source[7]
    loader = evaluation_loader(source, config(cache=cache, batch_size=1))
    with caplog.at_level(logging.WARNING):
        indices = [int(batch.indices) for _ in range(2) for batch in loader]
    assert indices == [index for index in range(101) if index != 7] * 2
    assert caplog.text.count("cannot be read") == 1
    assert "007.png" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_more_than_one_percent_damaged_files_are_an_error(tmp_path: Path, num_workers: int):
    root = fill_folder(tmp_path, {"ant": 101})
    for number in (3, 90):
        (root / "ant" / f"{number:03d}.png").write_bytes(b"no image")
    with pytest.raises(TooManyUnreadableError, match=r"(?s)2 of 101 .*repair or remove.*003\.png.*090\.png"):
        list(evaluation_loader(open_folder(root), config(num_workers=num_workers)))


def test_unreadable_files_are_counted_over_processes_and_interruptions(tmp_path: Path):
    root = fill_folder(tmp_path, {"ant": 240})
    for number in (3, 130, 200):
        (root / "ant" / f"{number:03d}.png").write_bytes(b"no image")
    source, settings = open_folder(root), config(batch_size=20, seed=1)
    pair = [training_loader(source, settings, rank=rank, world_size=2) for rank in range(2)]
    for loader in pair:
        list(loader)
    assert [sorted(loader.failures) for loader in pair] == [[3], [130, 200]]
    resumed = training_loader(source, settings, world_size=2)
    resumed.load_state_dict(pair[0].state_dict())
    assert resumed.failures == pair[0].failures
    with pytest.raises(TooManyUnreadableError, match="3 of 240"):
        resumed.count_failures(pair[1].failures)


def test_a_process_whose_whole_batch_is_unreadable_stays_in_step(tmp_path: Path):
    root = fill_folder(tmp_path, {"ant": 201})
    source, settings = open_folder(root), config(batch_size=1, seed=1)
    pair = [training_loader(source, settings, rank=rank, world_size=2) for rank in range(2)]
    seen = [[batch.indices.tolist() for batch in loader] for loader in pair]
    for position in (99, 50):  # positions of the second process; the first follows the last
        damaged = source.name(seen[1][position][0])
        (root / damaged).write_bytes(b"no image")
        again = training_loader(source, settings, rank=1, world_size=2)
        again.load_state_dict({**pair[1].state_dict(), "epoch": 0, "position": position})
        batches = iter(again)
        following = seen[1][(position + 1) % 100]
        assert next(batches).indices.tolist() == following
        assert again.state_dict()["position"] == (position + 1) % 100
        if position < 99:
            assert next(batches).indices.tolist() == following
    assert len(list(training_loader(source, settings, rank=1, world_size=2))) == 100
    assert sum(len(batch.indices) for batch in evaluation_loader(source, settings)) == 199


def test_examples_of_a_source_step_over_damaged_files(tmp_path: Path):
    root = fill_folder(tmp_path, {"ant": 201})
    source, settings = open_folder(root), config(**AUGMENTED)
    whole = example_batch(source, settings).pixels
    assert whole.shape == (8, 3, 8, 8)
    for number in (25, 150):  # the first images of the second and seventh parts
        (root / "ant" / f"{number:03d}.png").write_bytes(b"no image")
    examples = example_batch(source, settings).pixels
    loaded = by_index(evaluation_loader(source, settings))
    assert torch.equal(examples[[1, 6]], torch.stack([loaded[26], loaded[151]]))
    rest = [0, 2, 3, 4, 5, 7]
    assert torch.equal(examples[rest], whole[rest])
    assert len(example_batch(source, settings, 256).pixels) == 199
    (root / "ant" / "151.png").write_bytes(b"no image")
    with pytest.raises(TooManyUnreadableError, match="3 of 201"):
        example_batch(source, settings, 256)


def test_memory_keeps_crops_only_where_they_are_not_random(folder: Path):
    source = open_folder(folder)
    assert InMemory(source, ImageTransform(8))[0][0].size == (8, 8)
    assert InMemory(source, ImageTransform(8, crop="random"))[0][0].size == (12, 10)


def test_augmentation_is_off_without_being_asked_for():
    plain = replace(ImageTransform(8, "random", True, Affine(5)).without_augmentation())
    assert plain == ImageTransform(8, "center")
    assert ImageTransform(8, "resize").without_augmentation().crop == "resize"
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(plain.augment(pixels, Keys.range(0, 2)), pixels)


def test_a_killed_worker_ends_the_epoch_and_resuming_continues_it(folder: Path):
    settings = config(num_workers=2, batch_size=2, **AUGMENTED)
    source = open_folder(folder)
    expected = list(training_loader(source, settings))
    loader = training_loader(source, settings)
    begun = []

    def read_and_kill() -> None:
        for batch in loader:
            begun.append(batch)
            if len(begun) == 3:
                multiprocessing.active_children()[0].kill()
                time.sleep(30)  # torch's handler of the signal raises here, not at a random place later

    with pytest.raises(RuntimeError, match="worker"):
        read_and_kill()
    assert len(begun) < len(expected)
    resumed = training_loader(source, settings)
    resumed.load_state_dict(loader.state_dict())
    assert_same_batches(begun + list(resumed), expected)
