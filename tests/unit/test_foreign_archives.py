"""Archives and shards as other programs, other systems and failed downloads leave them."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.archives import write_tar

from vistok.data import DataConfig, captions, open_source
from vistok.data.captions import CaptionError
from vistok.data.sources import ImageSource, UnreadableImageError
from vistok.eval.images import ImageError, open_images


def png(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def zipped(path: Path, names: list[str]) -> Path:
    """An archive of images of these very names, which zipfile would change."""
    with zipfile.ZipFile(path, "w") as archive:
        for seed, name in enumerate(names):
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, png(seed))
    return path


def trained(path: Path, **options) -> ImageSource:
    source = "webdataset" if path.suffix == ".tar" else "folder"
    return open_source(DataConfig(8, root=str(path), **{"source": source, **options}))


def names_of(source: ImageSource) -> list[str]:
    return [source.name(index).removeprefix(str(source.files.source))[1:] for index in range(len(source))]


@pytest.mark.parametrize(
    "names",
    [
        ["/cat/a.png", "/dog/b.png"],
        ["/cat/a.png", "dog/b.png"],
        ["//cat/a.png", "dog//b.png"],
        ["./cat/a.png", "dog/./b.png"],
        ["../cat/a.png", "../../dog/b.png"],
        ["C:\\photos\\cat\\a.png", "C:\\photos\\dog\\b.png"],
        ["c:/photos/cat/a.png", "c:/photos/dog/b.png"],
        ["\\\\photos\\cat\\a.png", "\\\\photos\\dog\\b.png"],
    ],
)
def test_entries_lie_where_they_would_be_unpacked(tmp_path: Path, names: list[str]):
    path = zipped(tmp_path / "x.zip", names)
    source = trained(path)
    assert (source.classes, names_of(source)) == (("cat", "dog"), ["cat/a.png", "dog/b.png"])
    assert open_images(path).names == ["cat/a", "dog/b"]


def test_names_that_differ_in_dots_and_slashes_alone_are_one(tmp_path: Path, caplog):
    path = zipped(tmp_path / "x.zip", ["cat/a.png", "./cat/a.png", "cat//a.png", "dog/a.png"])
    assert len(trained(path)) == open_images(path).count == 2
    assert "cat/a.png (an earlier entry of that name), cat/a.png (an earlier" in caplog.text


@pytest.mark.parametrize(
    "names", [("/a.png", "a.cls"), ("././a.png", "a.cls"), ("x//a.png", "x/a.cls"), ("x\\a.png", "x/a.cls")]
)
def test_members_of_shards_find_their_labels(tmp_path: Path, names: tuple[str, str]):
    path = write_tar(tmp_path / "0.tar", {names[0]: png(0), names[1]: b"1"})
    source = trained(path)
    assert (source.classes, source[0][1]) == (("0", "1"), 1)


def test_links_of_shards_that_lead_out_are_none_within(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.png": png(0)})
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        for name, target in (("d/b.png", "../../a.png"), ("c.png", "/a.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    images = open_images(tmp_path / "0.tar")
    assert (images.names, images.files_read.left_out.count) == (["a"], 2)


def test_links_of_archives_are_named(tmp_path: Path, caplog):
    path = zipped(tmp_path / "x.zip", ["a.png"])
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("b.png")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "a.png")
    assert len(trained(path)) == open_images(path).count == 1
    assert "b.png (a link; zip without -y stores what it leads to)" in caplog.text


@pytest.mark.parametrize(
    ("stored", "told", "name"),
    [
        ("café".encode(), False, "café"),  # as macOS writes it
        ("日本".encode(), False, "日本"),
        ("café".encode(), True, "café"),
        (b"caf\x82", False, "café"),  # code page 437
        (b"caf\xe9", False, "cafΘ"),  # what another code page means is not known
        (b"ca\0fe", False, "ca\\x00fe"),
    ],
)
def test_names_of_entries_in_every_encoding(tmp_path: Path, caplog, stored: bytes, told: bool, name: str):
    plain = "c" * len(stored)
    data = bytearray(zipped(tmp_path / "x.zip", [f"{plain}/a.png", "dog/b.png"]).read_bytes())
    if told:
        data[6 + 1] |= 8
        data[data.index(b"PK\x01\x02") + 8 + 1] |= 8
    (tmp_path / "x.zip").write_bytes(bytes(data).replace(plain.encode(), stored))
    source = trained(tmp_path / "x.zip")
    assert set(source.classes) == {name, "dog"}
    assert [source[index][0].size for index in range(2)] == [(12, 10)] * 2
    assert ("read as code page 437" in caplog.text) == (name in ("café", "cafΘ") and b"\xc3" not in stored)


@pytest.mark.parametrize("stored", ["кошка".encode("cp866"), "猫表".encode("gbk"), "ソ".encode("shift-jis"), b"\xe9"])
@pytest.mark.parametrize("damage", ["", "renamed", "other", "version"])
def test_names_that_info_zip_repeats_in_utf8(tmp_path: Path, caplog, stored: bytes, damage: str):
    meant = "кошка"
    plain = "c" * len(stored + b"/a.png")
    crc = zlib.crc32(stored + b"/a.png" + (b"x" if damage == "renamed" else b""))
    content = bytes([1 + (damage == "version")]) + crc.to_bytes(4, "little") + f"{meant}/a.png".encode()
    field = struct.pack("<HH", 0x7076 if damage == "other" else 0x7075, len(content)) + content
    info = zipfile.ZipInfo(plain)
    info.extra = struct.pack("<HHB", 0x5455, 1, 0) + field
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, png(1))
        archive.writestr("dog/b.png", png(2))
    data = (tmp_path / "x.zip").read_bytes().replace(plain.encode(), stored + b"/a.png")
    (tmp_path / "x.zip").write_bytes(data)
    source = trained(tmp_path / "x.zip")
    assert len(source) == 2
    assert (meant in source.classes) == (not damage)
    assert ("read as code page 437" in caplog.text) == bool(damage)


def test_what_lies_beside_the_one_folder_of_images_is_named(tmp_path: Path, caplog):
    path = zipped(tmp_path / "x.zip", ["photos/a.png", "README.txt", "more/b.jxl"])
    assert names_of(trained(path)) == ["a.png"]
    assert "ignored: README.txt, more/b.jxl" in caplog.text
    assert open_images(path).files_read.left_out.count == 2


def test_captions_beside_the_one_folder_of_images_are_found(tmp_path: Path):
    path = zipped(tmp_path / "x.zip", ["photos/a.png"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("captions.jsonl", '{"file_name": "photos/a.png", "text": "a cat"}')
    assert trained(path).captions(0) == ("a cat",)


def test_what_to_take_as_root_in_place_of_an_archive(tmp_path: Path, caplog):
    trained(zipped(tmp_path / "x.zip", ["ds/train/a.png", "ds/val/a.png", "more/logo.png"]))
    assert "is the unpacked ds meant, which has train, val?" in caplog.text
    trained(zipped(tmp_path / "y.zip", ["a/b/c/cat/a.png", "a/b/c/dog/a.png"]))
    assert "its 2 folders are the classes, take the unpacked b/c as root" in caplog.text


@pytest.mark.parametrize("share", [0.01, 0.5, 0.97])
def test_a_zip_without_its_end_is_told_from_another_file(tmp_path: Path, share: float):
    data = zipped(tmp_path / "x.zip", [f"{number}.png" for number in range(5)]).read_bytes()
    (tmp_path / "x.zip").write_bytes(data[: int(share * len(data))])
    for opened in (trained, open_images):
        with pytest.raises(ValueError, match=r"x\.zip is a damaged .*end is missing, so it is cut, or a part"):
            opened(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress, "compressed by gzip; unpack it"),
        (bz2.compress, "compressed by bzip2; unpack it"),
        (lzma.compress, "compressed by xz; unpack it"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed by zstd; unpack it"),
        (lambda data: b"7z\xbc\xaf\x27\x1c" + data, "a 7z archive; unpack it"),
        (lambda data: b"Rar!" + data, "a RAR archive; unpack it"),
        (lambda data: b"<!doctype html>404", "a web page, as a failed download leaves it"),
        (lambda data: data, "reads with data.source="),
    ],
)
def test_archives_of_other_formats_are_told_by_their_contents(tmp_path: Path, content, told: str):
    shard = write_tar(tmp_path / "a.tar", {"a.png": png(0)}).read_bytes()
    archive = zipped(tmp_path / "a.zip", ["a.png"]).read_bytes()
    (tmp_path / "x.tar").write_bytes(content(archive))
    (tmp_path / "x.zip").write_bytes(content(shard))
    (tmp_path / "x.tgz").write_bytes(content(shard))
    for path, opened in [(tmp_path / "x.tar", trained), (tmp_path / "x.zip", trained), (tmp_path / "x.tgz", trained)]:
        with pytest.raises(ValueError, match=rf"{path.name}.* it is .*{told}"):
            opened(path)
    with pytest.raises(ImageError, match=rf"x\.tgz.* it is .*{told}"):
        open_images(tmp_path / "x.tgz")


@pytest.mark.parametrize("cut", [100, 512, 1500, 2048])
def test_a_cut_shard_is_to_be_fetched_again(tmp_path: Path, cut: int):
    data = write_tar(tmp_path / "x.tar", {f"{number}.png": png(number) for number in range(4)}).read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"x\.tar is no whole, uncompressed .*\); fetch or make it again"):
        trained(tmp_path / "x.tar")


def test_a_folder_in_place_of_shards_is_refused_with_the_pattern(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.png": png(0)})
    with pytest.raises(ValueError, match=r"is a folder; shards are files, so write .*/\*\.tar"):
        open_source(DataConfig(8, source="webdataset", root=str(tmp_path)))


@pytest.mark.parametrize("name", ["[set]", "a{0..2}b", "50%", "#1", "-x", "what?", "{}"])
def test_folders_of_shards_may_have_signs_of_patterns_in_their_names(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    path = write_tar(tmp_path / name / "0.tar", {"a.png": png(0)})
    assert len(trained(path)) == open_images(path).count == 1


def large_tar(path: Path, name: str, start: bytes) -> Path:
    """A shard with a member of 800 MB, most of it a hole of the file system, and a small image after it."""
    with path.open("wb") as file:
        for member, content, size in ((name, start, 800 << 20), ("z.png", png(1), len(png(1)))):
            info = tarfile.TarInfo(member)
            info.size = size
            file.write(info.tobuf())
            end = file.tell() + -(-size // 512) * 512
            file.write(content)
            file.seek(end)
        file.write(bytes(1024))
    return path


def test_a_damaged_png_of_800_megabytes_is_not_read_whole(tmp_path: Path):
    path = large_tar(tmp_path / "0.tar", "a.png", png(0)[:33])
    source, start = trained(path), time.process_time()
    with pytest.raises(UnreadableImageError, match=r"0\.tar:a\.png"):
        source[0]
    assert source[1][0].size == (12, 10)
    with pytest.raises(ImageError, match=r"0\.tar:a\.png"):
        open_images(path)
    assert time.process_time() - start < 20, "walking through the zeros would take minutes"


@pytest.mark.parametrize("name", ["z.txt", "z.json"])
def test_a_caption_of_800_megabytes_is_refused(tmp_path: Path, name: str):
    source = trained(large_tar(tmp_path / "0.tar", name, b"1"), split=None) if name == "z.txt" else None
    if source is not None:
        with pytest.raises(CaptionError, match=r"0\.tar:z\.txt has more than 1,048,576 bytes"):
            source.captions(0)
        return
    with pytest.raises(ValueError, match=r"0\.tar:z\.json holds no class id: the file has more than 1,048,576 bytes"):
        trained(large_tar(tmp_path / "0.tar", name, b"1"))


def test_captions_are_read_line_by_line(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(captions, "LONGEST", 100)
    path = zipped(tmp_path / "x.zip", ["a.png"])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("captions.jsonl", b"\n" * 1000 + b'{"file_name": "a.png", "text": "a cat"}\r\n' + b" " * 1000)
    with pytest.raises(CaptionError, match=r"captions\.jsonl:1002: the line has more than 100 bytes"):
        trained(path).captions(0)


def test_declared_sizes_are_not_believed(tmp_path: Path):
    data = bytearray(zipped(tmp_path / "x.zip", ["a.png", "b.png"]).read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 800 << 20)
    (tmp_path / "x.zip").write_bytes(data)
    assert [image.size for image, _ in (trained(tmp_path / "x.zip")[index] for index in range(2))] == [(12, 10)] * 2
    info = tarfile.TarInfo("a.png")
    info.size = 8 << 40
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + png(0))
    with pytest.raises(ValueError, match=r"0\.tar is no whole"):
        trained(tmp_path / "0.tar")


def test_devices_and_files_with_holes_are_named(tmp_path: Path, caplog):
    kinds = {"b": tarfile.BLKTYPE, "c": tarfile.CHRTYPE, "d": tarfile.FIFOTYPE, "e": b"Z"}
    write_tar(tmp_path / "0.tar", {"a.png": png(0)})
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.type = kind
            archive.addfile(info)
    with caplog.at_level(logging.WARNING):
        assert len(trained(tmp_path / "0.tar")) == 1
    assert all(f"{name}.png (a pipe, a socket or a device)" in caplog.text for name in kinds)


def test_archives_of_more_than_65535_entries_and_of_zip64(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(65_540):
            archive.writestr(f"{number}.txt", b"")
        with archive.open("a.png", "w", force_zip64=True) as file:
            file.write(png(0))
    images = open_images(tmp_path / "x.zip")
    assert (images.count, images.files_read.left_out.count) == (1, 65_540)


# Samples of shards


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        (["a.left.png", "a.right.png", "a.cls 1"], [1, 1]),
        (["a.left.png", "a.right.png", 'a.json {"label": 1}'], [1, 1]),
        (["a.left.png", "a.cls 1", "b.left.png", "b.cls 0"], [1, 0]),
        (["a.left.png", "a.right.png", "a.cls 1", "a.right.cls 0"], [1, 0]),
        (["v1.0.png", "v1.0.cls 1", "v1.1.png", 'v1.1.json {"label": 0}', "v1.cls 2"], [1, 0]),
        (["x.y/a.left.png", "x.y/a.cls 1"], [1]),
    ],
)
def test_images_of_one_key_share_its_label(tmp_path: Path, members: list[str], labels: list[int], caplog):
    parts = [member.partition(" ") for member in members]
    path = write_tar(tmp_path / "0.tar", {name: text.encode() or png(0) for name, _, text in parts})
    source = trained(path)
    assert [source[index][1] for index in range(len(source))] == labels
    assert not caplog.text


def test_images_of_one_key_share_its_texts(tmp_path: Path):
    members = {"a.left.png": png(0), "a.right.png": png(1), "a.txt": b"two views", "a.right.txt": b"the right one"}
    source = trained(write_tar(tmp_path / "0.tar", members))
    assert [source.captions(index) for index in range(2)] == [("two views",), ("the right one",)]


def test_class_ids_under_other_keys_are_named(tmp_path: Path, caplog):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.label.cls": b"1", "b.cls": b"1"})
    assert trained(path).classes == ()
    assert f"2 other files are ignored: {path}:a.label.cls, {path}:b.cls" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("a.cls", b" 3\n", 3),
        ("a.cls", b"007", 7),
        ("a.CLS", b"3", 3),
        ("a.json", b'\xef\xbb\xbf{"label": "3"}', 3),
        ("a.json", '{"label": 3}'.encode("utf-16"), 3),
        ("a.json", b"[3]", -1),
        ("a.json", b'{"label": -1}', -1),
        ("a.cls", b"-1", -1),
        ("a.cls", b"1e3", "got '1e3'"),
        ("a.cls", b"cat", "got 'cat'; number the classes from 0"),
        ("a.cls", "٣".encode(), "got '٣'"),
        ("a.cls", b"+3", "got '\\+3'"),
        ("a.cls", b"3\0", r"got '3\\x00'"),
        ("a.cls", b"3 4", "got '3 4'"),
        ("a.cls", b"-2", "got -2"),
        ("a.cls", b"\xff3", r"got '\\\\xff3'"),
        ("a.json", b'{"label": "cat"}', "got 'cat'"),
        ("a.json", b'{"label": [3]}', r"got \[3\]"),
        ("a.json", b'{"label": NaN}', "got nan"),
        ("a.json", b"{", "Expecting"),
    ],
)
def test_odd_labels_are_read_or_shown_as_they_are(tmp_path: Path, name: str, content: bytes, label: int | str):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), name: content})
    if isinstance(label, int):
        assert trained(path)[0][1] == label
        return
    with pytest.raises(ValueError, match=rf"0\.tar:{name} holds no class id: .*{label}"):
        trained(path)


def test_shards_may_keep_labels_in_different_files_but_not_for_some_images(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.cls": b"1"})
    write_tar(tmp_path / "1.tar", {"b.png": png(1), "b.json": b'{"label": 0}'})
    write_tar(tmp_path / "2.tar", {"c.png": png(2), "c.json": b'{"caption": "a cat"}'})
    source = trained(tmp_path / "{0..1}.tar")
    assert [source[index][1] for index in range(2)] == [1, 0]
    with pytest.raises(ValueError, match=r"1 of the 3 images .* have no label \(such as .*2\.tar:c\.png\)"):
        trained(tmp_path / "{0..2}.tar")
