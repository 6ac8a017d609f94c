"""Images from webdataset shards and Hugging Face's datasets."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.images import assert_same_batches, picture

from vistok.data import DataConfig, ResampledOrder, open_source, training_loader
from vistok.data.loader import TooManyUnreadableError
from vistok.data.shards import ShardSource, expand_braces
from vistok.signatures import ConfigError


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four labelled images."""
    for shard in range(3):
        files = {}
        for number in range(4 * shard, 4 * shard + 4):
            files |= {f"{number:04d}.png": encoded(number), f"{number:04d}.cls": str(number % 5).encode()}
        write_shard(tmp_path / "shards" / f"train-{shard:04d}.tar", files)
    return tmp_path / "shards"


def config(root: object, **changes) -> DataConfig:
    return DataConfig(8, source="webdataset", root=str(root), **{"batch_size": 5, **changes})


@pytest.mark.parametrize("pattern", ["train-{0000..0002}.tar", "*.tar", "{split}-*.tar"])
def test_shards_read_like_a_folder(shards: Path, pattern: str):
    source = open_source(config(shards / pattern))
    assert len(source) == 12
    assert source.classes == ("0", "1", "2", "3", "4")
    assert [source[index][1] for index in range(12)] == [index % 5 for index in range(12)]
    assert all(np.array_equal(np.asarray(source[i][0]), np.asarray(picture(i))) for i in range(12))
    assert source.name(7) == f"{shards}/train-0001.tar:0007.png"


def test_class_names_and_labels_in_json(tmp_path: Path):
    files = {"a/x.jpg": encoded(0), "a/x.json": json.dumps({"label": 1, "caption": "x"}).encode()}
    write_shard(tmp_path / "0.tar", files | {"b/x.jpg": encoded(1), "b/x.json": b'{"label": 0}'})
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_source(config(tmp_path / "0.tar"))
    assert source.classes == ("cat", "dog")
    assert [source[0][1], source[1][1]] == [1, 0]
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="names 1 classes, but there is a label 1"):
        open_source(config(tmp_path / "0.tar"))


@pytest.mark.parametrize("sidecars", [("cls", "json"), ("json", "cls")])
def test_a_caption_beside_a_label_hides_nothing(tmp_path: Path, sidecars: tuple[str, str]):
    contents = {"cls": b"3\n", "json": b'{"caption": "a cat", "label": 1}'}
    write_shard(tmp_path / "0.tar", {"a.png": encoded(0)} | {f"a.{kind}": contents[kind] for kind in sidecars})
    assert open_source(config(tmp_path / "0.tar"))[0][1] == 3
    contents["json"] = b'{"caption": "a cat"}'
    write_shard(tmp_path / "1.tar", {"a.png": encoded(0)} | {f"a.{kind}": contents[kind] for kind in sidecars})
    assert open_source(config(tmp_path / "1.tar"))[0][1] == 3


@pytest.mark.parametrize("content", [b'{"label": null}', b'{"caption": "x"}', b"[1, 2]"])
def test_json_without_a_label(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture):
    write_shard(tmp_path / "0.tar", {"a.png": encoded(0), "a.json": content})
    with caplog.at_level("INFO"):
        assert open_source(config(tmp_path / "0.tar"))[0][1] == -1
    assert "have no labels" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.cls", b"n01440764"),
        ("a.cls", b"-2"),
        ("a.json", b"{oops"),
        ("a.json", b'{"label": "cat"}'),
        ("a.json", b'{"label": 1.5}'),
        ("a.json", b'{"label": true}'),
        ("a.json", b'{"label": [1]}'),
    ],
)
def test_a_label_that_is_no_class_id_is_named(tmp_path: Path, name: str, content: bytes):
    write_shard(tmp_path / "0.tar", {"a.png": encoded(0), name: content})
    with pytest.raises(ValueError, match=rf"0\.tar:{name} holds no class id: "):
        open_source(config(tmp_path / "0.tar"))


def test_unlabelled_shards_are_unconditional(tmp_path: Path):
    write_shard(tmp_path / "0.tar", {"a.png": encoded(0), "a.txt": b"a caption", "b.png": encoded(1)})
    source = open_source(config(tmp_path / "0.tar"))
    assert (source.classes, source[1][1]) == ((), -1)
    write_shard(tmp_path / "1.tar", {"c.png": encoded(0), "c.cls": b"3"})
    with pytest.raises(ValueError, match=r"2 of the 3 images .* have no label \(such as .*0\.tar:a\.png\)"):
        open_source(config(tmp_path / "*.tar"))


def test_batches_do_not_depend_on_workers_and_resume(shards: Path):
    source = open_source(config(shards / "*.tar"))
    expected, loader = training_loader(source, config(shards)), training_loader(source, config(shards, num_workers=2))
    first = list(expected)
    assert_same_batches(list(loader), first)
    assert_same_batches(list(loader), list(expected))
    begun = training_loader(source, config(shards))
    next(iter(begun))
    resumed = training_loader(source, config(shards, num_workers=1))
    resumed.load_state_dict(begun.state_dict())
    assert_same_batches(list(resumed), first[1:])


def test_a_corrupt_image_in_a_shard_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = {f"{number:03d}.png": encoded(number) for number in range(120)}
    write_shard(tmp_path / "0.tar", files | {"007.png": b"no image"})
    with caplog.at_level("WARNING"):
        loader = training_loader(open_source(config(tmp_path / "0.tar")), config(tmp_path))
        assert sum(len(batch.indices) for batch in loader) == 119
    assert f"{tmp_path}/0.tar:007.png" in caplog.text
    assert list(loader.failures) == [7]
    write_shard(tmp_path / "1.tar", files | {"007.png": b"no image", "009.png": b"", "010.png": b"x"})
    with pytest.raises(TooManyUnreadableError, match=r"(?s)1\.tar:007\.png.*more|more than 1%"):
        list(training_loader(open_source(config(tmp_path / "1.tar")), config(tmp_path)))


def test_a_truncated_shard_is_named(shards: Path):
    path = shards / "train-0001.tar"
    path.write_bytes(path.read_bytes()[:1300])
    with pytest.raises(ValueError, match=r"train-0001\.tar is no whole, uncompressed \.tar file"):
        open_source(config(shards / "*.tar"))


@pytest.mark.parametrize("damage", [b"\xff" * 20, bytes(tarfile.BLOCKSIZE)])
def test_a_damaged_header_does_not_end_a_shard(shards: Path, damage: bytes):
    path = shards / "train-0001.tar"
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive]
    whole = path.read_bytes()
    for offset, named in ((offsets[0], ""), (offsets[4], rf"header at byte {offsets[4]} is damaged")):
        path.write_bytes(whole[:offset] + damage + whole[offset + len(damage) :])
        with pytest.raises(ValueError, match=rf"train-0001\.tar is no whole.*{named}"):
            open_source(config(shards / "*.tar"))


def test_missing_shards_and_splits(shards: Path):
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*train-0003\.tar"):
        open_source(config(shards / "train-{0000..0003}.tar"))
    with pytest.raises(ValueError, match=r"names no split; write \{split\}"):
        open_source(config(shards / "*.tar", split="val"))
    write_shard(shards / "empty.tar", {"readme.txt": b"x"})
    with pytest.raises(FileNotFoundError, match="no images in the 1 shards"):
        open_source(config(shards / "empty.tar"))


def test_braces():
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{0..1}-{0..1}")) == ["0-0", "0-1", "1-0", "1-1"]
    assert list(expand_braces("a.tar")) == ["a.tar"]
    with pytest.raises(ValueError, match="more than 100,000 shards"):
        ShardSource("a-{0..999999999}.tar")


def test_resampling_draws_with_replacement_and_alike_on_any_number_of_ranks():
    alone = ResampledOrder(50, 6).batches(1)
    pair = [ResampledOrder(50, 3, rank=rank, world_size=2).batches(1) for rank in range(2)]
    assert np.array_equal(np.concatenate(pair, axis=1), alone)
    assert not np.array_equal(alone, ResampledOrder(50, 6).batches(2))
    many = np.concatenate([ResampledOrder(50, 50).batches(epoch).ravel() for epoch in range(40)])
    counts = np.bincount(many, minlength=50)
    assert counts.min() > 10
    assert len(counts) == 50
    assert len(set(ResampledOrder(50, 50).batches(0)[0])) < 45, "some must repeat within an epoch"
    with pytest.raises(ValueError, match="2 samples do not fill one batch of 5"):
        ResampledOrder(2, 5)


def test_index_is_kept_until_a_shard_changes(shards: Path, tmp_path: Path, monkeypatch):
    read = [ShardSource(str(shards / "*.tar"), cache=tmp_path / "cache").name(7)]
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_: pytest.fail("a known shard was walked through again"))
        read.append(ShardSource(str(shards / "*.tar"), cache=tmp_path / "cache").name(7))
    assert read[0] == read[1]
    write_shard(shards / "train-0001.tar", {"new.png": encoded(0), "new.cls": b"1"})
    assert len(ShardSource(str(shards / "*.tar"), cache=tmp_path / "cache")) == 9


@pytest.mark.parametrize("change", [{"label": 2**70}, {"label": "1"}, {"offset": -1}, {"size": True}, {"name": 7}])
def test_a_damaged_index_is_made_anew(shards: Path, tmp_path: Path, change: dict):
    cache = tmp_path / "cache"
    before = ShardSource(str(shards / "train-0000.tar"), cache=cache)
    [kept] = (cache / "index").iterdir()
    index = json.loads(kept.read_text())
    index["samples"][0] = list(before.files.samples[0]._replace(**change))[1:]
    kept.write_text(json.dumps(index))
    after = ShardSource(str(shards / "train-0000.tar"), cache=cache)
    assert after.files.samples == before.files.samples
    assert json.loads(kept.read_text())["samples"] == [list(sample[1:]) for sample in before.files.samples]


def test_shards_are_read_where_no_index_can_be_kept(shards: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file in the place of the folder")
    assert len(ShardSource(str(shards / "*.tar"), cache=tmp_path / "cache")) == 12


def test_resampled_training(shards: Path):
    resampled = config(shards / "*.tar", order="resampled")
    loader = training_loader(open_source(resampled), resampled)
    assert isinstance(loader.order, ResampledOrder)
    assert [len(batch.indices) for batch in loader] == [5, 5]


@pytest.fixture
def saved_dataset(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [picture(number) for number in range(6)], "kind": [0, 1, 1, 0, 1, 0]}
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": train, "test": train.select(range(2))}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_huggingface_datasets(saved_dataset: Path):
    train, test = (
        open_source(DataConfig(8, source="huggingface", root=str(saved_dataset), split=split))
        for split in ("train", "test")
    )
    assert (len(train), len(test), train.classes) == (6, 2, ("cat", "dog"))
    assert [train[index][1] for index in range(6)] == [0, 1, 1, 0, 1, 0]
    assert np.array_equal(np.asarray(train[3][0]), np.asarray(picture(3)))
    assert train.fingerprint() != test.fingerprint()
    loaders = [training_loader(train, DataConfig(8, batch_size=3, num_workers=workers)) for workers in (0, 1)]
    assert_same_batches(*map(list, loaders))
    with pytest.raises(ValueError, match=r"has the splits train, test; got data\.split=val"):
        open_source(DataConfig(8, source="huggingface", root=str(saved_dataset), split="val"))
    with pytest.raises(ValueError, match=r"needs data\.name=…"):
        open_source(DataConfig(8, source="huggingface"))


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    """A data set with two columns of images, two of integers and one of text."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.Value("int64"),
            "score": datasets.Value("int32"),
            "caption": datasets.Value("string"),
        }
    )
    rows = {"image": [picture(number) for number in range(4)], "mask": [picture(9)] * 4, "label": [2, 0, 3, 0]}
    rows |= {"score": [1, -1, 1, 1], "caption": ["x"] * 4}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "columns"))
    return tmp_path / "columns"


def test_huggingface_columns_are_chosen(columns: Path, caplog: pytest.LogCaptureFixture):
    settings = DataConfig(8, source="huggingface", root=str(columns), image_column="image")
    with caplog.at_level("WARNING"):
        unconditional = open_source(settings)
    assert "unconditional; if there are class ids in label or score, set data.label_column" in caplog.text
    assert (unconditional.classes, unconditional[0][1]) == ((), -1)
    labelled = open_source(replace(settings, label_column="label"))
    assert (labelled.classes, [labelled[index][1] for index in range(4)]) == (("0", "1", "2", "3"), [2, 0, 3, 0])
    mask = open_source(replace(settings, image_column="mask"))
    assert np.array_equal(np.asarray(mask[0][0]), np.asarray(picture(9)))
    assert len({source.fingerprint() for source in (unconditional, labelled, mask)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": None}, "several columns to choose from: set data.image_column to image or mask"),
        ({"image_column": "photo"}, "data.image_column=photo: .* has no such column; it could be image or mask"),
        ({"label_column": "caption"}, "data.label_column=caption: .* has no such column; it could be label or score"),
        ({"label_column": "score"}, "data.label_column=score .* holds -1, which is no class id"),
    ],
)
def test_huggingface_columns_that_do_not_serve(columns: Path, changes: dict, message: str):
    settings = {"source": "huggingface", "root": str(columns), "image_column": "image", **changes}
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(8, **settings))


def test_huggingface_needs_datasets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'vistok\[datasets\]'"):
        open_source(DataConfig(8, source="huggingface", name="uoft-cs/cifar10"))
