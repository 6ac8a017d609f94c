"""The image reader: training and evaluation read the same images, and they match the files."""

from __future__ import annotations

import io
import logging
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from support.archives import write_tar

from vistok.data import DataConfig, decoding, files, open_source, training_loader
from vistok.data.captions import CaptionError
from vistok.data.clips import ClipTransform
from vistok.data.decoding import ImageDecoder
from vistok.data.formats import image_extensions
from vistok.data.loader import TooManyUnreadableError
from vistok.data.masks import pixel_masks
from vistok.data.movies import frames_to_pixels
from vistok.data.pictures import from_pil, open_picture
from vistok.data.sources import UnreadableImageError
from vistok.data.transforms import ImageTransform, center_crop_adm, crop_source
from vistok.eval.images import ImageError, open_images

SIZE = (12, 10)


def levels(seed: int, channels: int = 3) -> np.ndarray:
    shape = (SIZE[1], SIZE[0], channels) if channels > 1 else SIZE[::-1]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(levels(seed))


def turned(seed: int, orientation: int) -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(seed), exif


def write_every_kind(folder: Path) -> Path:
    """A file of every format and of every kind of pixels."""
    folder.mkdir(parents=True)
    for number, name in enumerate(image_extensions()):
        picture(number).save(folder / f"format{name}")
    for orientation in range(1, 9):
        for extension in ("jpg", "png", "tif", "webp"):
            image, exif = turned(orientation, orientation)
            image.save(folder / f"turned-{orientation}.{extension}", exif=exif)
    rgba = np.dstack([levels(1), levels(2, 1)])
    Image.fromarray(rgba).save(folder / "rgba.png")
    Image.fromarray(rgba[..., 2:]).save(folder / "la.png")
    Image.fromarray(rgba).quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(levels(3, 1)).save(folder / "grey-transparent.png", transparency=int(levels(3, 1)[0, 0]))
    picture(4).quantize(16).save(folder / "palette.gif", transparency=3)
    picture(5).convert("CMYK").save(folder / "cmyk.jpg")
    picture(6).convert("1").save(folder / "bits.png")
    Image.fromarray(levels(7, 1).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(levels(7, 1).astype(np.uint16) * 257).save(folder / "deep.tif")
    Image.fromarray(levels(8, 1).astype(np.float32) / 255).save(folder / "float.tif")
    return folder


def archived(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return target


def sharded(folder: Path, target: Path) -> Path:
    """Webdataset would group files that differ only in their extension into one sample."""
    with tarfile.open(target, "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.add(file, f"{file.stem}-{file.suffix[1:]}{file.suffix}")
    return target


def training_images(root: Path, source: str = "folder", **changes) -> dict[str, np.ndarray]:
    opened = open_source(DataConfig(8, source=source, root=str(root), split=None, **changes))
    return {opened.name(i): np.asarray(opened[i][0]) for i in range(len(opened))}


def squares(root: Path, source: str) -> torch.Tensor:
    """All images as training reads them, in the order of evaluation."""
    config = DataConfig(8, source=source, root=str(root), batch_size=1)
    opened = open_source(config)
    order = sorted(range(len(opened)), key=opened.files.path)
    batches = {int(b.indices): b.pixels for b in training_loader(opened, config)}
    return torch.cat([batches[index] for index in order])


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_training_and_evaluation_see_the_same_images(tmp_path: Path, kind: str):
    folder = write_every_kind(tmp_path / "images")
    root = {
        "folder": lambda: folder,
        "zip": lambda: archived(folder, tmp_path / "images.zip"),
        "tar": lambda: sharded(folder, tmp_path / "images.tar"),
    }[kind]()
    images = open_images(root, crop=8)
    assert images.count == len(list(folder.iterdir()))
    scored = torch.cat(list(images.batches(7)))
    trained = squares(root, "webdataset" if kind == "tar" else "folder")
    assert torch.equal(scored, ((trained + 1) * 127.5).round().to(torch.uint8))
    read = images.files_read
    assert (read.reading, read.left_out.count, sum(read.formats.values())) == ("photo", 0, images.count)
    assert (read.turned, read.transparent, read.deep) == (4 * 7, 5, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "webp"])
def test_photos_are_upright(tmp_path: Path, orientation: int, extension: str):
    image, exif = turned(0, orientation)
    options = {"lossless": True} if extension == "webp" else {}
    image.save(tmp_path / f"a.{extension}", exif=exif, **options)
    stored = Image.open(tmp_path / f"a.{extension}")
    stored.load()  # which turns TIFF files upright
    upright = np.asarray(stored if extension == "tif" else ImageOps.exif_transpose(stored))
    [seen] = training_images(tmp_path).values()
    assert np.array_equal(seen, upright)
    assert open_images(tmp_path).size == upright.shape[:2]
    assert np.array_equal(np.asarray(open_picture(tmp_path / f"a.{extension}", ImageDecoder())), upright)
    square = from_pil([Image.open(tmp_path / f"a.{extension}")], (10, 10), 3)
    assert torch.equal(square, from_pil([Image.fromarray(upright)], (10, 10), 3))


def test_protocols_read_as_their_peers_do(tmp_path: Path):
    image, exif = turned(0, 6)
    image.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.dstack([levels(1), np.zeros(SIZE[::-1], np.uint8)])).save(tmp_path / "hidden.png")
    expected = {name: np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("hidden.png", "turned.png")}
    images = open_images(tmp_path, reading="raw")
    for seen, known in zip(torch.cat(list(images.batches(1))), expected.values()):
        assert np.array_equal(seen.permute(1, 2, 0).numpy(), known)
    for seen, known in zip(training_images(tmp_path, reading="raw").values(), expected.values()):
        assert np.array_equal(seen, known)
    from vistok.eval.protocols import PROTOCOLS

    readings = {name: protocol.reading for name, protocol in PROTOCOLS.items()}
    assert {name for name, reading in readings.items() if reading == "raw"} == {"adm", "clean-fid", "dinov2"}


def test_transparent_parts_are_white(tmp_path: Path):
    colours, alpha = levels(1), np.zeros(SIZE[::-1], np.uint8)
    alpha[:, :3] = 255
    Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / "a.png")
    [seen] = training_images(tmp_path).values()
    assert np.array_equal(seen[:, :3], colours[:, :3])
    assert (seen[:, 3:] == 255).all()
    half = ImageDecoder().convert(Image.new("RGBA", (1, 1), (55, 55, 55, 128)))
    assert abs(half.getpixel((0, 0))[0] - 155) <= 1
    assert ImageDecoder(1).convert(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == 255


def test_masks_mark_nothing_where_nothing_is():
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    mask.putpixel((3, 2), (255, 255, 255, 255))
    assert pixel_masks(mask, 1, (8, 8)).nonzero().tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path: Path, extension: str):
    grey = levels(0, 1)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"a.{extension}")
    for channels in (1, 3):
        [seen] = training_images(tmp_path, channels=channels).values()
        assert np.array_equal(seen if channels == 1 else seen[..., 2], grey)
    pixels = from_pil([Image.open(tmp_path / f"a.{extension}")], (10, 10), 1)
    assert torch.equal(pixels, from_pil([Image.fromarray(grey)], (10, 10), 1))


@pytest.mark.parametrize(("bits", "white"), [(12, 1), (16, 0), (16, 1), (8, 0)])
def test_grey_tiff_files_of_other_bits_and_of_white_at_0_are_read_for_what_they_are(tmp_path: Path, bits, white):
    grey = levels(0, 1)
    stored = (grey if white else 255 - grey).astype(np.uint16) << (bits - 8)
    if bits == 12:  # two levels in three bytes
        left, right = stored[:, ::2], stored[:, 1::2]
        data = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8).tobytes()
    else:
        data = stored.astype(f"<u{bits // 8}").tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(data, bits, photometric=white))
    [seen] = training_images(tmp_path, channels=1).values()
    assert np.array_equal(seen, grey)


def tiff(data: bytes, bits: int, photometric: int) -> bytes:
    """A TIFF file of one grey image of SIZE in one strip."""
    width, height = SIZE
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (levels(0, 1).astype(np.float32), r"floats of \d+ to \d+; floats are read within \[0, 1\] only"),
        (np.full((4, 4), np.nan, np.float32), "floats of nan"),
        (levels(0, 1).astype(np.int32) << 20, "32-bit integers of .* which of them is white is not known"),
    ],
)
def test_pixels_that_could_mean_anything_are_refused_by_name(tmp_path: Path, values: np.ndarray, message: str):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=rf"a\.tif: its pixels are {message}"):
        open_source(DataConfig(8, root=str(tmp_path)))[0]
    with pytest.raises(ImageError, match=rf"a\.tif: its pixels are {message}"):
        list(open_images(tmp_path).batches(1))
    with pytest.raises(ValueError, match=message):
        open_picture(tmp_path / "a.tif", ImageDecoder())


def test_what_is_not_read_is_counted_and_named_on_both_sides(tmp_path: Path, caplog):
    picture(0).save(tmp_path / "a.png")
    for name in ("b.jxl", "c.txt", "clip.mp4"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(training_images(tmp_path)) == 1
    named = "3 other files are ignored: b.jxl, c.txt, clip.mp4"
    assert named in caplog.text
    assert str(open_images(tmp_path).files_read.left_out) == named
    assert open_images(archived(tmp_path, tmp_path.parent / "x.zip")).files_read.left_out.count == 3


def test_an_overview_is_no_sample_but_a_picture_called_grid_is(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    for folder in (tmp_path, tmp_path / "samples"):
        for name in ("0.png", "grid.png"):
            picture(0).save(folder / name)
    (tmp_path / "samples" / "samples.json").write_text("{}")
    names = ["0", "grid", "samples/0"]
    assert open_images(tmp_path).names == names
    assert len(training_images(tmp_path / "samples")) == 1
    assert open_images(tmp_path).files_read.left_out.count == 0


def test_links_that_lead_back_are_not_followed(tmp_path: Path, caplog):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "photos" / name / "0.png")
    (tmp_path / "more").mkdir()
    picture(1).save(tmp_path / "more" / "1.png")
    (tmp_path / "photos" / "cow").symlink_to(tmp_path / "more")
    (tmp_path / "photos" / "all").symlink_to(".")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "gone").symlink_to("nowhere")
    with caplog.at_level(logging.WARNING):
        source = open_source(DataConfig(8, root=str(tmp_path / "photos")))
    assert source.classes == ("cat", "cow", "dog")
    assert len(source) == open_images(tmp_path / "photos").count == 3
    assert "all (a link that leads back)" in caplog.text
    assert open_images(tmp_path / "photos").files_read.left_out.count == 3


def oriented_png(where: str) -> bytes:
    """A PNG of which the given chunk says that it is turned to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    profile = b"\nexif\n%8d\n" % (len(content) + 6) + (b"Exif\0\0" + content).hex().encode() + b"\n"
    chunk = {
        "exif": (b"eXIf", content),
        "xmp": (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'),
        "profile": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
    }[where.partition(" ")[0]]
    return png_with_chunk(*chunk, before=b"IDAT" if where.endswith("before") else b"IEND")


@pytest.mark.parametrize(
    "where", [f"{kind} {side}" for kind in ("exif", "xmp", "profile") for side in ("before", "behind")]
)
def test_the_orientation_of_a_png_counts_wherever_it_is_written(tmp_path: Path, where: str):
    (tmp_path / "a.png").write_bytes(oriented_png(where))
    upright = np.asarray(picture(3).transpose(Image.Transpose.ROTATE_270))
    (trained,) = training_images(tmp_path).values()
    scored = open_images(tmp_path)
    assert np.array_equal(trained, upright)
    assert np.array_equal(next(scored.batches(1))[0].permute(1, 2, 0).numpy(), upright)
    assert scored.files_read.turned == 1


@pytest.mark.parametrize("crop", ["center", "random", "random_resized", "resize"])
@pytest.mark.parametrize("tall", [False, True])
def test_extreme_shapes_do_not_fill_the_memory(crop: str, tall: bool):
    length = 3_000_000  # at 256 px whole, this image would have 196 billion pixels
    ramp = (np.arange(length) * 255 // (length - 1)).astype(np.uint8)
    image = Image.fromarray(ramp[:, None] if tall else ramp[None])
    cropped = ImageTransform(256, crop).crop_image(image, (0.25, 0.25, 0.25))
    assert cropped.size == (256, 256)
    expected = {"center": 127, "resize": 127}.get(crop, 63)  # the grey level at the position that was asked for
    assert abs(np.asarray(cropped).mean() - expected) <= 1


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1)])
def test_extreme_frames_do_not_fill_the_memory(shape: tuple[int, int]):
    frames = np.full((2, *shape, 1), 127, np.uint8)
    assert ClipTransform(2, 64).pixels(frames).shape == (3, 2, 64, 64)


def test_only_extreme_shapes_are_cut_out_before_they_are_resized():
    assert crop_source((320, 10)) == (0, 0, 320, 10)
    assert crop_source((10, 321), (0.0, 0.99)) == (0, 1, 10, 321)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_are_found_below(tmp_path: Path, kind: str, caplog):
    inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for split, names in (("train", ("n01", "n02")), ("val", ("",)), ("test", ("",))):
        for name in names:
            (inner / split / name).mkdir(parents=True, exist_ok=True)
            picture(0).save(inner / split / name / "0.png")
    (tmp_path / "ILSVRC" / "Annotations").mkdir()
    (tmp_path / "ILSVRC" / "Annotations" / "a.xml").write_text("x")
    root = tmp_path / "ILSVRC" if kind == "folder" else archived(tmp_path / "ILSVRC", tmp_path / "x.zip")
    train, val = (open_source(DataConfig(8, root=str(root), split=split)) for split in ("train", "val"))
    assert (train.classes, len(train), val.classes, len(val)) == (("n01", "n02"), 2, (), 1)
    assert open_images(root).files_read.splits is not None
    picture(0).save(tmp_path / "ILSVRC" / "Annotations" / "logo.png")
    root = tmp_path / "ILSVRC" if kind == "folder" else archived(tmp_path / "ILSVRC", tmp_path / "x.zip")
    with caplog.at_level(logging.WARNING):
        open_source(DataConfig(8, root=str(root)))
    assert "Data/CLS-LOC meant, which has test, train, val?" in caplog.text


def test_a_root_one_level_too_high_and_images_in_no_split_are_told(tmp_path: Path, caplog):
    for name in ("cat", "dog"):
        (tmp_path / "a" / "b" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "a" / "b" / name / "0.png")
    with caplog.at_level(logging.WARNING):
        assert open_source(DataConfig(8, root=str(tmp_path))).classes == ("a",)
    assert f"its 2 folders are the classes, take {tmp_path}/a/b as root" in caplog.text
    for name in ("train", "val", "extra"):
        (tmp_path / "c" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "c" / name / "0.png")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(DataConfig(8, root=str(tmp_path / "c")))) == 1
    assert "1 images are in none of train, val and are ignored, such as extra/0.png" in caplog.text


@pytest.mark.parametrize("names", ["Training Testing", "train2017 val2017", "seg_train seg_test", "dev TEST eval"])
def test_splits_of_other_names_are_not_taken_for_classes_without_a_word(tmp_path: Path, caplog, names: str):
    for name in names.split():
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "a.png")
    assert len(open_source(DataConfig(8, root=str(tmp_path))).classes) == len(names.split())
    assert "are read as classes; if they are splits, take one as root" in caplog.text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("Cat", "cat"),
        ("cat", "cat "),
        ("a\u200bb", "ab"),
        ("a b", "a\u00a0b"),
        ("\uff21", "A"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_classes_that_look_alike_are_told(tmp_path: Path, caplog, one: str, other: str, archive: bool):
    root = write_files(tmp_path, {f"{one}/0.png": png(0), f"{other}/1.png": png(1), "dog/2.png": png(2)}, archive)
    assert len(open_source(DataConfig(8, root=str(root))).classes) == 3
    assert f"look alike are classes of their own: {', '.join(map(ascii, sorted((one, other))))};" in caplog.text


def test_folders_that_systems_add_hold_no_images(tmp_path: Path, caplog):
    folders = ("@eaDir/0.png", "b/@eaDir/2.png", "$RECYCLE.BIN", "System Volume Information", "#recycle", "__MACOSX")
    files = {"a/0.png": png(0), "b/1.png": png(1)} | {f"{folder}/x.jpg": png(2) for folder in folders}
    for archive in (False, True):
        root = write_files(tmp_path, files, archive)
        assert open_source(DataConfig(8, root=str(root))).classes == ("a", "b")
        assert open_images(root).count == 2
    assert not caplog.text


def test_classes_may_be_called_like_trains(tmp_path: Path, caplog):
    for name in ("trainer", "bullet train", "testament", "car"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "a.png")
    open_source(DataConfig(8, root=str(tmp_path)))
    assert not caplog.text


def test_a_folder_of_splits_below_is_not_recommended_as_a_folder_of_classes(tmp_path: Path, caplog):
    for split in ("training_set", "test_set"):
        for name in ("cats", "dogs"):
            (tmp_path / "dataset" / split / name).mkdir(parents=True)
            picture(0).save(tmp_path / "dataset" / split / name / "0.png")
    open_source(DataConfig(8, root=str(tmp_path)))
    assert "if its folders test_set, training_set are splits, take one as root" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_what_is_no_file_is_named_and_left_out(tmp_path: Path, caplog):
    picture(0).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    source = open_source(DataConfig(8, root=str(tmp_path)))
    images = open_images(tmp_path)
    assert (len(source), images.count, images.files_read.left_out.count) == (1, 1, 3)
    assert "gone.png (a link to nothing), pipe.png (a pipe, a socket or a device), zeros.png" in caplog.text
    assert len(source.fingerprint()) == 64


def test_photos_beside_a_config_are_no_run(tmp_path: Path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "config.yaml").write_text("camera: old")
    assert open_images(tmp_path).count == 1


# Archives


def test_archives_made_on_windows(tmp_path: Path):
    content = io.BytesIO()
    picture(0).save(content, "PNG")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("set\\cat\\0.png", "set\\dog\\0.png"):
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # which the constructor would turn on Windows alone
            archive.writestr(entry, content.getvalue())
    source = open_source(DataConfig(8, root=str(tmp_path / "x.zip")))
    assert source.classes == ("cat", "dog")
    assert source[1][1] == 1
    assert open_images(tmp_path / "x.zip").names == ["cat/0", "dog/0"]


def archive_with(path: Path, damage: str, count: int = 120) -> Path:
    """An archive of PNG files of which the second is damaged."""
    content = io.BytesIO()
    picture(0).save(content, "PNG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            archive.writestr(f"{number:03d}.png", content.getvalue())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[1]
    central = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    if damage == "bytes":
        start = info.header_offset + 30 + len(info.filename)
        data[start + 20 : start + 40] = bytes(20)
    elif damage == "method":
        data[info.header_offset + 8] = data[central + 10] = 9  # Deflate64
    elif damage == "encrypted":
        data[info.header_offset + 6] |= 1
        data[central + 8] |= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("damage", "reason"), [("bytes", "entry is damaged"), ("method", "method 9"), ("encrypted", "is encrypted")]
)
def test_a_single_bad_entry_is_named_and_left_out(tmp_path: Path, damage: str, reason: str, caplog):
    path = archive_with(tmp_path / "x.zip", damage)
    config = DataConfig(8, root=str(path), batch_size=10)
    with caplog.at_level(logging.WARNING):
        loader = training_loader(open_source(config), config)
        assert sum(len(batch.indices) for batch in loader) == 119
    assert f"{path}/001.png" in caplog.text
    assert reason in caplog.text
    with pytest.raises(ImageError, match=rf"x\.zip/001\.png: .*{reason}"):
        list(open_images(path).batches(200))
    few = DataConfig(8, root=str(archive_with(tmp_path / "y.zip", damage, 20)), batch_size=5)
    with pytest.raises(TooManyUnreadableError, match=rf"y\.zip/001\.png.*{reason}"):
        list(training_loader(open_source(few), few))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_entries_of_other_methods(tmp_path: Path, method: int):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", png(number))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    start = data.index(b"1.png") + 25
    data[start : start + 40] = bytes(byte ^ 0x5A for byte in data[start : start + 40])
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UnreadableImageError, match=r"x\.zip/1\.png"):
        open_source(DataConfig(8, root=str(tmp_path / "x.zip")))[1]
    with pytest.raises(ImageError, match=r"x\.zip/1\.png"):
        open_images(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_captions_of_an_archive_are_named(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("captions.jsonl", '{"file_name": "a.png", "text": "grey dust"}')
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(content.replace(b"grey dust", b"grey must"))
    source = open_source(DataConfig(8, root=str(tmp_path / "x.zip")))
    with pytest.raises(CaptionError, match=r"x\.zip/captions\.jsonl cannot be read: .*CRC"):
        source.captions(0)


@pytest.mark.parametrize("text", ['{"en": "a cat"}', '"\\ud800"', "7", '[["a"]]'])
def test_texts_that_are_none_are_refused(tmp_path: Path, text: str):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.json": f'{{"caption": {text}}}'.encode()})
    with pytest.raises(CaptionError, match=r"0\.tar:a\.json holds no caption"):
        open_source(DataConfig(8, source="webdataset", root=str(path))).captions(0)
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text(f'{{"file_name": "a.png", "text": {text}}}')
    with pytest.raises(CaptionError, match=r"captions\.jsonl:1: expected"):
        open_source(DataConfig(8, root=str(tmp_path))).captions(0)


def test_texts_of_shards_begin_without_a_byte_order_mark(tmp_path: Path):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.txt": "a cat\r\n".encode("utf-8-sig")})
    assert open_source(DataConfig(8, source="webdataset", root=str(path))).captions(0) == ("a cat",)


@pytest.mark.parametrize("archive", [False, True])
def test_an_image_has_its_caption_beside_it(tmp_path: Path, archive: bool, caplog):
    files = {
        "cats/a.png": png(0),
        "cats/a.txt": "a cat\r\n".encode("utf-8-sig"),
        "cats/b.v2.PNG": png(1),
        "cats/b.v2.TXT": "zwei Kätzchen".encode(),
        "cats/c.png": png(2),
        "cats/c.txt": b"listed elsewhere",
        "cats/d.png": png(3),
        "captions.jsonl": b'{"file_name": "cats/c.png", "text": ["one", "two"]}',
    }
    root = write_files(tmp_path, files, archive)
    source = open_source(DataConfig(8, root=str(root)))
    assert [source.captions(index) for index in range(4)] == [("a cat",), ("zwei Kätzchen",), ("one", "two"), ()]
    assert "ignored" not in caplog.text
    assert source.classes == ("cats",)
    assert not open_images(root).files_read.left_out.count


@pytest.mark.parametrize("archive", [False, True])
def test_texts_beside_no_image_are_counted_and_damaged_ones_named(tmp_path: Path, archive: bool, caplog):
    root = write_files(tmp_path, {"a.png": png(0), "a.txt": b"\xff\xfe", "notes.txt": b"mine"}, archive)
    source = open_source(DataConfig(8, root=str(root)))
    assert "1 other file is ignored: notes.txt" in caplog.text
    with pytest.raises(CaptionError, match=r"/a\.txt holds no caption: .*utf-8"):
        source.captions(0)


def write_files(folder: Path, files: dict[str, bytes], archive: bool) -> Path:
    if archive:
        with zipfile.ZipFile(folder / "x.zip", "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
        return folder / "x.zip"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_entries_of_one_name_are_counted(tmp_path: Path, caplog):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("set/a.png", "set/b.png", "set/a.png", "set\\b.png"):
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, png(0))
    assert len(open_source(DataConfig(8, root=str(tmp_path / "x.zip")))) == open_images(tmp_path / "x.zip").count == 2
    assert "a.png (an earlier entry of that name), b.png (an earlier entry of that name)" in caplog.text


def test_damaged_archives_are_named(tmp_path: Path):
    path = archive_with(tmp_path / "x.zip", "none", 3)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"XXXX"))
    for opened in (lambda: open_source(DataConfig(8, root=str(path))), lambda: open_images(path)):
        with pytest.raises(ValueError, match=r"x\.zip"):
            opened()


def test_a_large_member_is_not_held_in_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "HELD_IN_MEMORY", 100)
    path = archive_with(tmp_path / "x.zip", "none", 3)
    assert np.array_equal(training_images(path)[f"{path}/001.png"], levels(0))
    bad = archive_with(tmp_path / "y.zip", "bytes", 3)
    with pytest.raises(UnreadableImageError, match=r"y\.zip/001\.png"):
        open_source(DataConfig(8, root=str(bad)))[1]


# Shards


def png(seed: int) -> bytes:
    content = io.BytesIO()
    picture(seed).save(content, "PNG")
    return content.getvalue()


def test_keys_with_dots(tmp_path: Path):
    members = {"v1.0.png": png(0), "v1.0.cls": b"1", "v1.1.png": png(1), "v1.1.json": b'{"label": 0}'}
    path = write_tar(tmp_path / "0.tar", members)
    source = open_source(DataConfig(8, source="webdataset", root=str(path)))
    assert [source[index][1] for index in range(2)] == [1, 0]
    assert open_images(path).names == ["v1.0", "v1.1"]


def test_further_images_of_a_sample_are_no_samples(tmp_path: Path):
    path = write_tar(tmp_path / "0.tar", {"a.jpg": png(0), "a.seg.png": png(1), "a.cls": b"0", "a.txt": b"x"})
    source = open_source(DataConfig(8, source="webdataset", root=str(path)))
    assert [source.name(index) for index in range(len(source))] == [f"{path}:a.jpg"]
    assert open_images(path).names == ["a"]
    assert open_images(path).files_read.left_out.count == 0


def test_samples_that_are_not_read_are_named(tmp_path: Path, caplog):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), "b.jxl": b"x", "b.cls": b"3", "c.npy": b"x"})
    with caplog.at_level(logging.WARNING):
        source = open_source(DataConfig(8, source="webdataset", root=str(path)))
    assert len(source) == open_images(path).count == 1
    named = f"3 other files are ignored: {path}:b.jxl, {path}:b.cls, {path}:c.npy"
    assert named in caplog.text
    assert str(open_images(path).files_read.left_out) == named


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.cls", b"999999999999"),
        ("a.cls", b"30000000"),
        ("a.cls", b"9" * 5000),
        ("a.cls", b"1" * (1 << 21)),
        ("a.json", b'{"label": 1e400}'),
        ("a.json", b'{"label": 100000}'),
        ("a.json", b"[" * 100_000),
        ("a.cls", b"1_000"),
        ("a.cls", "٣".encode()),
        ("a.cls", b"3.0"),
        ("a.cls", b"0x3"),
        ("a.cls", b""),
        ("a.json", b'{"label": true}'),
    ],
)
def test_labels_have_a_bound(tmp_path: Path, name: str, content: bytes):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), name: content})
    with pytest.raises(ValueError, match=rf"0\.tar:{name} holds no class id: "):
        open_source(DataConfig(8, source="webdataset", root=str(path)))
    assert open_images(path).count == 1, "labels do not concern an evaluation"


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_in_shards_are_what_they_lead_to_and_all_else_is_named(tmp_path: Path, caplog):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x/a.png")
        info.size = len(png(0))
        archive.addfile(info, io.BytesIO(png(0)))
        archive.addfile(link("y/b.png", "x/a.png", tarfile.LNKTYPE))  # what tar makes of a second name of a file
        archive.addfile(link("y/c.png", "../x/a.png", tarfile.SYMTYPE))
        archive.addfile(link("d.png", "y/c.png", tarfile.SYMTYPE))
        archive.addfile(link("e.png", "/etc/passwd", tarfile.SYMTYPE))
        archive.addfile(link("f.png", "f.png", tarfile.LNKTYPE))
        archive.addfile(link("g.png", "", tarfile.FIFOTYPE))
    with caplog.at_level(logging.WARNING):
        source = open_source(DataConfig(8, source="webdataset", root=str(path)))
    assert [source.name(i).rpartition(":")[2] for i in range(len(source))] == ["x/a.png", "y/b.png", "y/c.png", "d.png"]
    assert all(np.array_equal(np.asarray(source[i][0]), levels(0)) for i in range(4))
    assert open_images(path).count == 4
    for name in ("e.png (a link to no file", "f.png (a link to no file", "g.png (a pipe"):
        assert f"{path}:{name}" in caplog.text


def test_hidden_files_of_shards_are_no_images(tmp_path: Path, caplog):
    """As macOS writes them beside files."""
    members = {"./._a.png": b"x", "./a.png": png(0), "__MACOSX/a.png": b"x", ".cache/b.png": png(1), "../c.png": png(2)}
    path = write_tar(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(DataConfig(8, source="webdataset", root=str(path)))) == 2
    assert sorted(open_images(path).names) == ["a", "c"]
    assert f"3 other files are ignored: {path}:._a.png (hidden)" in caplog.text


@pytest.mark.parametrize("name", ["a.cls", "a.json"])
def test_two_labels_of_one_name_are_refused(tmp_path: Path, name: str):
    write_tar(tmp_path / "0.tar", {"a.png": png(0), name: b"1"})
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        info = tarfile.TarInfo(f"./{name}")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"2"))
    with pytest.raises(ValueError, match=f"has two files {name}"):
        open_source(DataConfig(8, source="webdataset", root=str(tmp_path / "0.tar")))


@pytest.mark.parametrize(("content", "names"), [(b"\xef\xbb\xbfcat\r\n", ("cat",)), (b"caf\xe9\n", None)])
def test_class_names_of_shards_are_read_as_text_or_named(tmp_path: Path, content: bytes, names):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.cls": b" 0\n"})
    (tmp_path / "classnames.txt").write_bytes(content)
    if names:
        assert open_source(DataConfig(8, source="webdataset", root=str(path))).classes == names
        return
    with pytest.raises(ValueError, match=r"classnames\.txt is no text in UTF-8: byte 0xe9 at 3"):
        open_source(DataConfig(8, source="webdataset", root=str(path)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "F", "LA", "PA", "RGBX", "RGBa", "I;16", "I;16B"],
)
def test_images_of_every_mode_are_read_alike_by_pipelines_and_as_frames(mode: str, channels: int):
    levels = {"F": 1, "YCbCr": (100, 128, 128)}  # 0 is no colour in YCbCr
    image = Image.new(mode, SIZE, levels.get(mode, 0))
    still = from_pil([image], (8, 8), channels)
    frames = frames_to_pixels([image, image], 8, channels)
    assert still.shape == (1, channels, 8, 8)
    assert torch.allclose(frames[:, :, 0], still, atol=0.01)


def test_frames_are_photos(tmp_path: Path):
    hidden = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert frames_to_pixels([hidden], 8, 3).min() == 1
    deep = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert abs(float(frames_to_pixels([deep], 8, 3).mean())) < 0.01
    with pytest.raises(ValueError, match="32-bit integers"):
        frames_to_pixels([Image.new("I", (8, 8))], 8, 3)


@pytest.mark.parametrize("extension", ["jp2", "pcx", "tga", "ppm"])  # the lowest Pillow writes them, too
def test_formats_that_are_not_read_are_refused_with_those_that_are(tmp_path: Path, extension: str):
    picture(1).save(tmp_path / f"a.{extension}")
    with pytest.raises(
        ValueError, match=rf"a\.{extension}: no image that can be read; .* another format; expected .png"
    ):
        open_picture(tmp_path / f"a.{extension}", ImageDecoder())


def test_names_do_not_command_a_terminal(tmp_path: Path, caplog):
    for name in ("red\x1b[31m", "two\nlines", "back\x9b2J"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / f"{name}.png")
        (tmp_path / name / f"{name}.txt").touch()
    with caplog.at_level(logging.WARNING):
        source = open_source(DataConfig(8, root=str(tmp_path)))
    names = [*source.classes, *(source.name(index) for index in range(3)), *open_images(tmp_path).names]
    assert all(text.isprintable() for text in [*names, *caplog.text.splitlines()])
    assert source.classes == ("back\\x9b2J", "red\\x1b[31m", "two\\nlines")


def test_one_key_has_one_image(tmp_path: Path):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.jpg": png(1)})
    for opened in (
        lambda: open_source(DataConfig(8, source="webdataset", root=str(path))),
        lambda: open_images(path),
    ):
        with pytest.raises(ValueError, match=r"0\.tar: the key 'a' has two images"):
            opened()


def test_shards_whose_keys_begin_anew(tmp_path: Path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {"0.png": png(2 * shard), "1.png": png(2 * shard + 1)})
    images = open_images(str(tmp_path / "{0..1}.tar"))
    assert images.count == 4
    assert len(open_source(DataConfig(8, source="webdataset", root=str(tmp_path / "*.tar")))) == 4


# Files


def png_with_chunk(kind: bytes, content: bytes, before: bytes = b"IDAT") -> bytes:
    data = png(3)
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    at = data.index(before) - 4
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("extension", ["png", "jpg", "tif"])
def test_a_file_that_a_program_would_read_is_no_image(tmp_path: Path, monkeypatch, extension: str):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments: started.append(arguments))
    lines = "%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 12 10", "%%EndComments", "showpage", "%%EOF", ""
    (tmp_path / f"a.{extension}").write_text("\n".join(lines))
    with pytest.raises(UnreadableImageError, match=rf"a\.{extension}"):
        open_source(DataConfig(8, root=str(tmp_path)))[0]
    with pytest.raises(ImageError, match=rf"a\.{extension}"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=rf"a\.{extension}"):
        open_picture(tmp_path / f"a.{extension}")
    assert not started


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent"),
    [
        (1, 0, b"\x00\x00", (0,)),
        (2, 0, b"\x55" * 3, (1,)),
        (4, 0, b"\x77" * 6, (7,)),
        (8, 0, b"\x07" * 12, (7,)),
        (16, 0, b"\x80\x01" * 12, (0x8001,)),
        (8, 2, b"\x80\x10\x20" * 12, (0x80, 0x10, 0x20)),
        (16, 2, b"\x80\x01\x10\x02\x20\x03" * 12, (0x8001, 0x1002, 0x2003)),
    ],
)
def test_the_transparent_colour_of_every_depth_shows_the_background(
    tmp_path: Path, depth: int, colour: int, row: bytes, transparent: tuple[int, ...]
):
    header = struct.pack(">IIBBBBB", *SIZE, depth, colour, 0, 0, 0)
    chunks = {
        b"IHDR": header,
        b"tRNS": struct.pack(f">{len(transparent)}H", *transparent),
        b"IDAT": zlib.compress((b"\0" + row) * SIZE[1]),
        b"IEND": b"",
    }
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    [seen] = training_images(tmp_path).values()
    assert seen.min() == 255
    assert next(open_images(tmp_path).batches(1)).min() == 255


def test_a_png_with_a_long_text(tmp_path: Path):
    text = zlib.compress(b"x" * (3 << 20))
    for name, content in (
        ("z.png", png_with_chunk(b"zTXt", b"Comment\0\0" + text)),
        ("i.png", png_with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + text)),
        ("c.png", png_with_chunk(b"iCCP", b"Profile\0\0" + text)),
    ):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)decompressed data too large"):
        Image.open(tmp_path / "z.png").load()
    for seen in training_images(tmp_path).values():
        assert np.array_equal(seen, levels(3))
    assert open_images(tmp_path).count == 3
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20, "no setting of Pillow is changed"


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"tEXt", b"C\0" + b"x" * (1 << 19))] * 130,  # more than 64 MiB together
        [(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(b"x" * (1 << 20)))] * 70,
        [(b"zTXt", b"C\0\7x")],  # with an unknown compression
        [(b"iCCP", b"no name")],
    ],
)
def test_texts_that_pillow_refuses_do_not_hide_a_png(tmp_path: Path, chunks: list[tuple[bytes, bytes]]):
    data = png(3)
    written = b"".join(png_with_chunk(*chunk)[33 : 45 + len(chunk[1])] for chunk in chunks)
    (tmp_path / "a.png").write_bytes(data[:33] + written + data[33:])
    with pytest.raises((OSError, ValueError)), Image.open(tmp_path / "a.png") as image:
        image.load()
    [seen] = training_images(tmp_path).values()
    assert np.array_equal(seen, levels(3))
    assert open_images(tmp_path).count == 1


@pytest.mark.parametrize("kind", [b"sRGB", b"gAMA", b"pHYs", b"acTL", b"fcTL", b"eXIf", b"iCCP", b"tIME", b"abCd"])
@pytest.mark.parametrize("damage", ["empty", "checksum"])
def test_damaged_chunks_that_no_pixel_needs_do_not_hide_a_png(tmp_path: Path, kind: bytes, damage: str):
    data = bytearray(png_with_chunk(kind, b"" if damage == "empty" else b"12345678"))
    if damage == "checksum":
        data[33 + 8 + 8] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    [seen] = training_images(tmp_path).values()
    assert np.array_equal(seen, levels(3))
    assert open_images(tmp_path).count == 1


def test_a_png_that_is_read_without_its_texts_is_upright_and_transparent(tmp_path: Path):
    image, exif = turned(3, 6)
    image.save(tmp_path / "a.png", exif=exif, transparency=image.getpixel((0, 0)))
    whole = training_images(tmp_path)[f"{tmp_path}/a.png"]
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + png_with_chunk(b"zTXt", b"C\0\7x")[33 : 45 + 4] + data[33:])
    assert np.array_equal(training_images(tmp_path)[f"{tmp_path}/a.png"], whole)


def test_what_is_no_png_to_others_is_told(tmp_path: Path):
    header = struct.pack(">IIBBBBB", *SIZE, 8, 6, 0, 0, 0)
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(bytes((4 * SIZE[0] + 1) * SIZE[1])) + packed.flush()
    chunks = {b"CgBI": b"\x50\0\x20\6", b"IHDR": header, b"IDAT": data, b"IEND": b""}
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items())
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(UnreadableImageError, match=r"a\.png: it is Apple's form of PNG"):
        open_source(DataConfig(8, root=str(tmp_path)))[0]


@pytest.mark.parametrize("side", [100_000, 2**31 - 1])
def test_sizes_beyond_any_are_refused_with_the_limit(tmp_path: Path, side: int):
    data = png(3)
    header = struct.pack(">II", side, side) + data[24:29]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(data[:16] + header + checksum + data[33:])
    with pytest.raises(
        ImageError, match=r"a\.png: it says that it has [\d,]+ pixels; up to [\d,]+ are read, .* store it smaller"
    ):
        open_images(tmp_path)


def test_a_damaged_text_does_not_hide_a_png_and_other_damage_is_named(tmp_path: Path):
    data = bytearray(png_with_chunk(b"tEXt", b"a\0b"))
    data[33 + 8 + 1] ^= 1  # with a wrong checksum
    (tmp_path / "a.png").write_bytes(data)
    [seen] = training_images(tmp_path).values()
    assert np.array_equal(seen, levels(3))
    data[-20] ^= 1  # of the pixels, too
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UnreadableImageError, match=r"a\.png"):
        open_source(DataConfig(8, root=str(tmp_path)))[0]


@pytest.mark.skipif(os.name == "nt", reason="names are texts there")
def test_names_that_are_no_utf8(tmp_path: Path, caplog):
    name = os.fsdecode(b"caf\xe9")
    for number in range(2):
        (tmp_path / f"{name}{number}").mkdir()
        picture(number).save(tmp_path / f"{name}{number}" / f"{name}.png")
    (tmp_path / f"{name}0" / f"{name}.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        source = open_source(DataConfig(8, root=str(tmp_path)))
    assert source.classes == ("caf\\xe90", "caf\\xe91")
    assert source.name(0).encode().endswith(b"caf\\xe9.png")
    assert len(source.fingerprint()) == 64
    assert np.array_equal(np.asarray(source[1][0]), levels(1))
    assert [name.encode() for name in open_images(tmp_path).names]
    archive = write_tar(tmp_path / "x.tar", {f"{name}.png": png(0)})
    assert open_source(DataConfig(8, source="webdataset", root=str(archive))).name(0).encode()


def test_a_large_photo_is_decoded_small(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 1_000_000)
    ramp = np.linspace(0, 255, 1600, dtype=np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (1200, 1600, 3)).copy()).save(tmp_path / "a.jpg", quality=95)
    small = open_source(DataConfig(64, root=str(tmp_path)))[0][0]
    assert small.size == (200, 150)
    assert open_source(DataConfig(64, root=str(tmp_path), reading="raw"))[0][0].size == (1600, 1200)
    seen = next(open_images(tmp_path, crop=64).batches(1)).float()
    exact = next(open_images(tmp_path, crop=64, reading="raw").batches(1)).float()
    assert (seen - exact).abs().max() <= 2


@pytest.mark.parametrize("kind", ["jpg", "mpo", "png", "transparent png", "deep png", "webp", "bmp", "gif", "tif"])
def test_every_large_photo_becomes_small_at_once(tmp_path: Path, monkeypatch, kind: str):
    ramp = np.linspace(0, 255, 1600, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (1201, 1600, 3)).copy())
    if kind == "transparent png":
        image.putalpha(Image.fromarray(np.broadcast_to(ramp[::-1], (1201, 1600)).copy()))
    if kind == "deep png":
        image = Image.fromarray(np.broadcast_to(ramp.astype(np.uint16) * 257, (1201, 1600)).copy())
    last = kind.rpartition(" ")[2]
    image.save(tmp_path / f"a.{last}", **({"quality": 95} if last in ("jpg", "mpo", "webp") else {}))
    with (tmp_path / f"a.{last}").open("rb") as file:
        whole = ImageDecoder(side=64).read(file)
    monkeypatch.setattr(decoding, "LARGE", 1_000_000)
    monkeypatch.setattr(decoding, "STRIP", 100_000)
    with (tmp_path / f"a.{last}").open("rb") as file:
        small = ImageDecoder(side=64).read(file)
    assert (whole.size, small.size) == ((1600, 1201), (200, 151))
    seen, exact = (np.asarray(center_crop_adm(one, 64), dtype=int) for one in (small, whole))
    assert np.abs(seen - exact).max() <= 2


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_large_webp_is_decoded_once_to_what_pillow_makes_of_it(tmp_path: Path, monkeypatch, options: dict, mode: str):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 400, len(mode)), dtype=np.uint8))
    image.save(tmp_path / "a.webp", **options)
    monkeypatch.setattr(decoding, "LARGE", 1000)
    results = []
    for still in (decoding._still_webp, lambda image: None):
        monkeypatch.setattr(decoding, "_still_webp", still)
        with (tmp_path / "a.webp").open("rb") as file:
            results.append(np.asarray(ImageDecoder(side=20).read(file)))
    assert results[0].shape == (76, 100, 3)
    assert np.array_equal(*results)


def test_a_moving_webp_is_left_to_pillow(tmp_path: Path, monkeypatch):
    picture(0).save(tmp_path / "a.webp", save_all=True, append_images=[picture(1)], lossless=True)
    monkeypatch.setattr(decoding, "LARGE", 10)
    assert np.array_equal(training_images(tmp_path)[f"{tmp_path}/a.webp"], levels(0))


def test_strips_change_nothing(tmp_path: Path, monkeypatch):
    folder = write_every_kind(tmp_path / "photos")
    for channels in (1, 3):
        whole = training_images(folder, channels=channels)
        with monkeypatch.context() as context:
            context.setattr(decoding, "STRIP", 3 * SIZE[0])
            strips = training_images(folder, channels=channels)
        assert whole.keys() == strips.keys()
        assert all(np.array_equal(whole[name], strips[name]) for name in whole)


def test_damaged_exif_is_no_damaged_image(tmp_path: Path):
    picture(0).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    [seen] = training_images(tmp_path).values()
    assert seen.shape == (10, 12, 3)


def bombs() -> dict[str, bytes]:
    """Small files that say that they have very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    def tiff(width: int, height: int) -> bytes:
        tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 0)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)

    jpeg = io.BytesIO()
    Image.new("L", (64, 64)).save(jpeg, "JPEG")
    content = bytearray(jpeg.getvalue())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    gif_frame = struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02\x02\x4c\x01\0;"
    screen = b"\x80\0\0" + bytes(3) + b"\xff" * 3 + b","
    return {
        "wide.png": png(20000, 20000),
        "widest.png": png(2**31 - 1, 2**31 - 1),
        "high.png": png(1, 2**31 - 1),
        "wide.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + screen + gif_frame,
        "wide.jpg": bytes(content),
        "wide.tif": tiff(60000, 60000),
        "widest.tif": tiff(2**32 - 1, 2**32 - 1),
        "wide.bmp": bmp,
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_with_the_bound(tmp_path, name):
    (tmp_path / name).write_bytes(bombs()[name])
    bound = r"it says that it has [\d,]+ pixels; up to 178,956,970 are read"
    for reading in ("photo", "raw"):
        with pytest.raises(Image.DecompressionBombError, match=bound), (tmp_path / name).open("rb") as file:
            ImageDecoder(3, reading).read(file)
    with pytest.raises(ValueError, match=rf"{name} is damaged or cannot be decoded: {bound}"):
        open_picture(tmp_path / name, ImageDecoder())
