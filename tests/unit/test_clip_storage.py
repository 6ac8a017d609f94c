"""Clips in webdataset shards, and clips that are decoded once and kept on disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.data.clip_shards import ClipShardSource
from vistok.data.clip_sources import InMemoryClips, SelectedClips
from vistok.data.clips import ClipTransform
from vistok.data.config import DataConfig
from vistok.data.decoded_clips import DecodedClips
from vistok.data.loader import evaluation_loader, training_loader
from vistok.data.movies import mp4_bytes
from vistok.data.opening import open_source
from vistok.data.video_files import VideoSource, folder_videos
from vistok.data.videos import UnreadableClipError
from vistok.signatures import ConfigError

pytest.importorskip("av")


def clip(number: int, length: int = 6, size: tuple[int, int] = (24, 32)) -> bytes:
    frames = np.full((length, *size, 3), 20 * number, np.uint8)
    frames[:, :, : size[1] // 2] += np.arange(length, dtype=np.uint8)[:, None, None, None] * 9
    return mp4_bytes(frames)


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    """Two shards of three videos with labels, and a folder of the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for shard in range(2):
        files = {}
        for number in range(3 * shard, 3 * shard + 3):
            files |= {f"{number:03d}.mp4": clip(number), f"{number:03d}.cls": str(number % 2).encode()}
            path = tmp_path / "folder" / str(number % 2) / f"{number:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip(number))
        write_shard(tmp_path / f"train-{shard}.tar", files | {f"{shard}.txt": b"a note"})
    return tmp_path


def config(**changes) -> DataConfig:
    return DataConfig(**({"image_size": 16, "num_frames": 4, "batch_size": 2, "split": None} | changes))


def batches(data: DataConfig, loader=evaluation_loader) -> list:
    return list(loader(open_source(data), data))


def test_clips_keep_their_captions_however_they_are_stored(shards):
    class Captioned(VideoSource):
        def captions(self, index: int) -> tuple[str, ...]:
            return (f"clip {index}",)

    source = Captioned(folder_videos(shards / "folder").paths[:2], [0, 0])
    stored = InMemoryClips(source), DecodedClips(source, ClipTransform(4, 16)), SelectedClips(source, [1, 0])
    assert [clips.captions(1) for clips in stored] == [("clip 1",), ("clip 1",), ("clip 0",)]


def test_shards_of_videos_read_as_a_folder_of_them(shards):
    data = config(source="webdataset", root=str(shards / "train-{0..1}.tar"))
    source = open_source(data)
    assert isinstance(source, ClipShardSource)
    assert source.classes == ("0", "1")
    assert [source.label(index) for index in range(6)] == [0, 1, 0, 1, 0, 1]
    assert source.name(4) == f"{shards}/train-1.tar:004.mp4"
    folder = {Path(name).stem: index for index, name in enumerate(map(str, folder_videos(shards / "folder").paths))}
    plain = folder_videos(shards / "folder")
    for index in range(6):
        there = folder[f"{index:03d}"]
        assert np.array_equal(source.read(index, [5, 0]), plain.read(there, [5, 0]))
    assert [len(batch.pixels) for batch in batches(data)] == [2, 2, 2]
    assert len(batches(config(source="webdataset", root=data.root, num_workers=1), training_loader)) == 3


def test_shards_without_videos_or_with_two_of_a_key_are_refused(shards, tmp_path):
    write_shard(tmp_path / "empty.tar", {"a.png": b"", "a.cls": b"1"})
    with pytest.raises(FileNotFoundError, match=r"no videos in the 1 shards of .*empty\.tar; of \.mp4"):
        open_source(config(source="webdataset", root=str(tmp_path / "empty.tar")))
    write_shard(tmp_path / "two.tar", {"a.mp4": clip(1), "a.avi": clip(2)})
    with pytest.raises(ValueError, match="the key 'a' has two videos"):
        open_source(config(source="webdataset", root=str(tmp_path / "two.tar")))
    write_shard(tmp_path / "label.tar", {"a.mp4": clip(1), "a.cls": b"dog"})
    with pytest.raises(ValueError, match=r"a\.cls holds no class id"):
        open_source(config(source="webdataset", root=str(tmp_path / "label.tar")))


@pytest.mark.parametrize("crop", ["center", "resize"])
def test_decoded_clips_are_the_decoded_ones_up_to_rounding(shards, crop):
    data = {"source": "videos", "root": str(shards / "folder"), "crop": crop}
    plain, kept = (batches(config(**data, cache=cache)) for cache in ("none", "disk"))
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert (one.pixels - other.pixels).abs().max() <= 1.01 / 255
    (folder,) = (path for path in (shards / "cache/vistok/clips").iterdir() if path.is_dir())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert torch.equal(batches(config(**data, cache="disk"))[0].pixels, kept[0].pixels)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before  # decoded once
    sides = {tuple(video["shape"]) for video in json.loads((folder / "index.json").read_text())["videos"]}
    assert sides == {(6, 16, 21 if crop == "center" else 16, 3)}


def test_decoded_clips_remember_what_could_not_be_read_and_span_shards(shards, tmp_path, monkeypatch):
    (shards / "folder/0/002.mp4").write_bytes(b"no video")
    monkeypatch.setattr("vistok.data.decoded_clips.SHARD_BYTES", 7000)
    monkeypatch.setattr("vistok.data.decoded_clips.BLOCK", 4)
    source = folder_videos(shards / "folder")
    decoded = DecodedClips(source, ClipTransform(4, 16), tmp_path / "decoded")
    broken = next(index for index in range(6) if source.name(index).endswith("002.mp4"))
    with pytest.raises(UnreadableClipError, match=r"002\.mp4"):
        decoded.length(broken)
    assert len(list((tmp_path / "decoded").rglob("*.u8"))) == 3
    for copy in (decoded, pickle.loads(pickle.dumps(decoded))):
        for index in set(range(6)) - {broken}:
            assert copy.length(index) == 6
            near = source.read(index, [3]).mean() - copy.read(index, [3]).mean()
            assert abs(near) < 1
    other = DecodedClips(source, ClipTransform(4, 12), tmp_path / "decoded")
    assert other.read(0, [0]).shape == (1, 12, 16, 3)


def test_a_disk_cache_is_for_clips():
    with pytest.raises((ValueError, ConfigError), match="cache: disk keeps the frames of videos"):
        DataConfig(16, source="digits", cache="disk")
