"""Clips: frames by index, which of them make a clip, folders and lists of videos, moving digits."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vistok.data.clips import ClipBatches, ClipTransform
from vistok.data.config import DataConfig
from vistok.data.loader import Loader, evaluation_loader, training_loader
from vistok.data.moving_digits import MovingDigitsSource
from vistok.data.opening import open_source
from vistok.data.order import SequentialOrder
from vistok.data.video_decoders import open_video
from vistok.data.video_files import VideoSource, folder_videos, listed_videos, survey
from vistok.data.videos import DecoderMissingError, FrameFolder, UnreadableClipError, VideoFile

av = pytest.importorskip("av")

CODECS = {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx", ".gif": "gif"}


def grey(number: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """A frame (H, W, 3) whose brightness encodes its number."""
    return np.full((*size, 3), 10 + 12 * number, np.uint8)


def write_video(path: Path, count: int = 18, size: tuple[int, int] = (32, 48), times: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        stream.gop_size = 5
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(grey(number, size), format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of these frames, by their brightness."""
    return [round((float(frame.mean()) - 10) / 12) for frame in frames]


@pytest.mark.parametrize("extension", CODECS)
def test_frames_are_found_by_index_in_any_order(tmp_path, extension):
    video = open_video(write_video(tmp_path / f"clip{extension}"))
    assert len(video) == 18
    for frames in ([0], [17], [3, 4, 5, 6], [9, 2, 9, 16], list(range(18))):
        assert numbers(video.read(frames)) == frames
    assert not video.variable_rate
    assert "PyAV" in video.decoder
    with pytest.raises(UnreadableClipError, match="there is no frame 18; it has 18"):
        video.read([18])


def test_frames_of_a_variable_rate_keep_their_order_and_are_told(tmp_path):
    times = [number * (1 if number < 9 else 3) for number in range(18)]
    video = open_video(write_video(tmp_path / "clip.mp4", times=times))
    assert video.variable_rate
    assert numbers(video.read([8, 9, 10, 17])) == [8, 9, 10, 17]


def test_folders_of_frames_are_videos_in_natural_order(tmp_path):
    for number in range(12):
        Image.fromarray(grey(number)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    video = open_video(tmp_path)
    assert isinstance(video, FrameFolder)
    assert numbers(video.read([2, 10, 11])) == [2, 10, 11]
    Image.new("RGBA", (48, 32), (100, 100, 100, 7)).save(tmp_path / "frame_1.png")
    Image.new("L", (48, 32), 100).save(tmp_path / "frame_2.png")
    assert video.read([1, 2]).shape == (2, 32, 48, 3)
    Image.new("L", (8, 8)).save(tmp_path / "frame_3.png")
    with pytest.raises(UnreadableClipError, match="unlike sizes"):
        video.read([2, 3])


def test_damaged_and_foreign_files_are_named(tmp_path):
    whole = write_video(tmp_path / "clip.mp4").read_bytes()
    for name, content in (("cut.mp4", whole[: len(whole) // 2]), ("text.avi", b"no video"), ("empty.webm", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableClipError, match=name):
            open_video(tmp_path / name).read([17])
    with pytest.raises(UnreadableClipError, match=r"\.txt extension is none of \.mp4"):
        open_video(tmp_path / "list.txt")
    # A playlist would open the files that it names.
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nclip.mp4\n")
    with pytest.raises(UnreadableClipError, match="playlist"):
        len(open_video(tmp_path / "playlist.mp4"))


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DecoderMissingError, match="pip install 'vistok"):
        VideoFile(path)


@given(length=st.integers(1, 60), count=st.integers(1, 20), stride=st.integers(1, 4), u=st.floats(0, 0.999999))
@settings(max_examples=100, deadline=None)
def test_a_clip_lies_in_its_video(length, count, stride, u):
    for start in ("random", "center", "first"):
        frames = ClipTransform(count, 8, stride, start=start).frames(length, u)
        assert len(frames) == count
        assert 0 <= frames[0] <= frames[-1] < length
        if length >= (count - 1) * stride + 1:
            assert all(b - a == stride for a, b in pairwise(frames))
        else:
            assert frames[0] == 0
            assert frames[-1] == length - 1


def test_short_videos_repeat_their_last_frame_or_are_refused():
    assert ClipTransform(5, 8).frames(3) == [0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="3 frames, fewer than the 9 that 5 frames with a stride of 2 need"):
        ClipTransform(5, 8, 2, short="refuse").frames(3)
    with pytest.raises(ValueError, match="start is 'last'; allowed: 'random', 'center', 'first'"):
        ClipTransform(5, 8, start="last")


@pytest.mark.parametrize("crop", ["center", "random", "resize"])
@pytest.mark.parametrize("size", [(31, 47), (64, 8), (8, 8)])
def test_all_frames_are_cropped_and_mirrored_alike(crop, size):
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    transform = ClipTransform(3, 8, crop=crop, flip=True)
    clip = transform.pixels(image.repeat(3, 0), (0.3, 0.7, 0.1))
    assert clip.shape == (3, 3, 8, 8)
    assert torch.equal(clip[:, 0], clip[:, 2])
    assert float(clip.abs().max()) <= 1 + 1e-6
    assert torch.equal(transform.pixels(image, (0.3, 0.7, 0.9)).flip(-1), clip[:, :1])
    assert ClipTransform(3, 8, channels=1).pixels(image).shape == (1, 1, 8, 8)


def test_center_crop_is_that_of_torchvision():
    from torchvision.transforms import functional

    frames = np.random.default_rng(0).integers(0, 256, (2, 37, 61, 3), dtype=np.uint8)
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    expected = functional.center_crop(functional.resize(images, 16, antialias=True), 16) / 127.5 - 1
    torch.testing.assert_close(ClipTransform(2, 16).pixels(frames), expected.transpose(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "run" / "v_Run_g01_c01.avi", 18)
    write_video(root / "run" / "v_Run_g01_c02.avi", 3)
    write_video(root / "jump" / "v_Jump_g01_c01.avi", 18)
    (root / "jump" / "v_Jump_g01_c02.avi").write_bytes(b"damaged")
    return root


def test_class_folders_are_labels_and_what_is_wrong_is_counted_and_named(folder):
    source = folder_videos(folder)
    assert source.classes == ("jump", "run")
    assert [source.label(index) for index in range(4)] == [0, 0, 1, 1]
    found = survey(source, ClipTransform(8, 16))
    assert found.lengths == [18, 0, 18, 3]
    assert list(found.too_short.values()) == [3]
    assert [Path(name).name for name in found.unreadable] == ["v_Jump_g01_c02.avi"]
    assert found.describe().startswith("4 videos; 1 cannot be read (")


def test_batches_leave_out_what_cannot_be_read_and_do_not_depend_on_the_batch(folder):
    source = folder_videos(folder)
    reader = ClipBatches(source, ClipTransform(8, 16, short="refuse"), seed=3)
    batch, failures = reader.load(np.arange(4), epoch=1)
    assert batch.pixels.shape == (2, 3, 8, 16, 16)
    assert batch.indices.tolist() == [0, 2]
    assert batch.labels.tolist() == [0, 1]
    assert sorted(failures) == [1, 3]
    assert "3 frames, fewer than the 8" in failures[3]
    assert torch.equal(reader.load(np.array([2]), epoch=1)[0].pixels, batch.pixels[1:])
    assert not torch.equal(reader.load(np.array([2]), epoch=2)[0].pixels, batch.pixels[1:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_decode(folder, num_workers):
    source = folder_videos(folder)
    good = VideoSource([source.paths[0], source.paths[2]], [0, 1], source.classes)
    loader = Loader(ClipBatches(good, ClipTransform(8, 16)), SequentialOrder(2, 1), num_workers=num_workers)
    clips = torch.cat([batch.pixels for batch in loader])
    assert torch.equal(clips, ClipBatches(good, ClipTransform(8, 16)).load(np.arange(2), 0)[0].pixels)


def test_lists_of_ucf101_larp_and_kinetics(folder, tmp_path):
    ucf = tmp_path / "trainlist01.txt"
    ucf.write_text("run/v_Run_g01_c01.avi 2\njump/v_Jump_g01_c01.avi 1\n")
    source = listed_videos(ucf, folder)
    assert source.classes == ("Jump", "Run")
    assert [source.label(index) for index in range(2)] == [1, 0]
    larp = tmp_path / "ucf101_train.csv"
    larp.write_text(
        "\ufeff"  # as Excel saves it
        "id,path,action,label\n0,run/v_Run_g01_c01.avi,Whatever,7\n"
    )
    assert listed_videos(f"{ucf}+{larp}", folder).classes == ("Jump", "Run")
    write_video(tmp_path / "k" / "rock climbing" / "abc_000001_000011.mp4", 9)
    kinetics = tmp_path / "k600_val.csv"
    kinetics.write_text("label,youtube_id,time_start,time_end,split\nrock climbing,abc,1,11,val\n")
    source = listed_videos(kinetics, tmp_path / "k")
    assert (source.classes, source.length(0)) == (("rock climbing",), 9)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("list.txt", "run/v_Run_g01_c09.avi 1\n", FileNotFoundError, "1 of 1 videos .* are not there: .*v_Run_g01_c09"),
        ("list.csv", "file,kind\na.mp4,b\n", ValueError, "has the columns file, kind; expected id, path"),
        ("empty.txt", "\n", FileNotFoundError, "names no videos"),
        ("empty.csv", "", ValueError, "has the columns ; expected id, path"),
        ("head.csv", "id,path,action,label\n", FileNotFoundError, "names no videos"),
        ("short.csv", "id,path\n1,run/v_Run_g01_c01.avi\n7\n", ValueError, r"short\.csv: row 3 .*it has no path"),
        ("time.csv", "label,youtube_id,time_start,time_end\na,abc,1.5,11\n", ValueError, r"time\.csv: row 2 .*'1\.5'"),
        (
            "cut.csv",
            "label,youtube_id,time_start,time_end\na,abc,1\n",
            ValueError,
            r"cut\.csv: row 2 .*expected youtube",
        ),
        ("some.csv", "path\nrun/v_Run_g01_c01.avi\n../x.avi\n", ValueError, "1 of 2 videos of .* have no action"),
        ("latin.txt", "run/caf\udce9.avi\n", ValueError, r"latin\.txt is no text in UTF-8: byte 0xe9"),
        ("long.csv", f"path\n{'x' * 200_000}\n", ValueError, r"long\.csv is no CSV file: field larger"),
    ],
)
def test_bad_lists_are_named(folder, tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    write_video(folder.parent / "x.avi", 2)
    with pytest.raises(error, match=message):
        listed_videos(tmp_path / name, folder)


def test_folders_without_videos_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        folder_videos(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no videos in .*; videos are files \(\.mp4"):
        folder_videos(tmp_path)
    write_video(tmp_path / "a" / "one.avi", 2)
    write_video(tmp_path / "loose.avi", 2)
    with pytest.raises(ValueError, match=r"such as loose\.avi"):
        folder_videos(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Moving digits


@given(index=st.integers(0, 50), seed=st.integers(0, 5), size=st.sampled_from([16, 32, 48]))
@settings(max_examples=25, deadline=None)
def test_digits_move_inside_the_frame_at_their_speed(index, seed, size):
    source = MovingDigitsSource(image_size=size, num_frames=40, seed=seed, speed=(0.05, 0.1))
    places = source.positions(index, range(40))
    assert places.min() >= 0
    assert places.max() <= size - size // 2
    steps = np.abs(np.diff(places, axis=0))
    assert np.hypot(*steps.T).max() <= 0.1 * size + 1.5  # rounded to whole pixels
    assert steps.sum() > 0


def test_sideways_digits_move_left_and_right_at_their_speed():
    source = MovingDigitsSource(image_size=32, num_frames=40, sideways=True)
    places = np.stack([source.positions(index, range(40)) for index in range(20)])  # (clips, frames, left and top)
    assert set(places[..., 1].flatten()) == {8}
    assert (places[..., 0].min(), places[..., 0].max()) == (0, 16)
    assert np.abs(np.diff(places[..., 0], axis=1)).max() <= 32 * 0.09 + 1
    assert source.fingerprint() != MovingDigitsSource(image_size=32, num_frames=40).fingerprint()


def test_moving_digits_are_of_their_class_and_keep_their_split():
    train, test = (MovingDigitsSource(split=split, motions=2) for split in ("train", "test"))
    assert len(train) + len(test) == 2 * 1797
    assert train.classes == tuple("0123456789")
    first, again = train.read(0, range(16)), train.read(0, [3])
    assert first.shape == (16, 32, 32, 1)
    assert np.array_equal(first[3:4], again)
    assert train.label(0) == train.label(1)
    assert not np.array_equal(first, train.read(1, range(16)))
    assert train.fingerprint() != test.fingerprint()
    batch, failures = ClipBatches(train, ClipTransform(16, 32, channels=1)).load(np.arange(3), 0)
    assert batch.pixels.shape == (3, 1, 16, 32, 32)
    assert not failures
    with pytest.raises(ValueError, match="at least 16 px, got 8"):
        MovingDigitsSource(image_size=8)


# ---------------------------------------------------------------------------------------------------------------------
# The data section


def test_a_config_opens_clips_and_its_loaders_read_them(folder):
    config = DataConfig(16, source="videos", root=str(folder), num_frames=4, frame_stride=2, batch_size=2, limit=3)
    source = open_source(config)
    assert len(source) == 3
    assert source.classes == ("jump", "run")
    digits = DataConfig(16, source="moving_digits", num_frames=5, channels=1, batch_size=4, limit=8, flip=True)
    for cache in ("none", "memory"):
        section = replace(digits, cache=cache)
        loader = training_loader(open_source(section), section)
        batch = next(iter(loader))
        assert batch.pixels.shape == (4, 1, 5, 16, 16)
        assert set(batch.labels.tolist()) <= set(range(10))
        held_out = torch.cat([b.pixels for b in evaluation_loader(open_source(section), section)])
        assert held_out.shape == (8, 1, 5, 16, 16)
    assert torch.equal(held_out, torch.cat([b.pixels for b in evaluation_loader(open_source(digits), digits)]))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"source": "moving_digits"}, "say how long they are with num_frames"),
        ({"source": "moving_digits", "num_frames": 4, "crop": "random_resized"}, "clips are cropped by"),
        ({"source": "moving_digits", "num_frames": 0}, "num_frames"),
    ],
)
def test_sections_that_do_not_fit_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(16, **section)


def test_sources_of_images_have_no_clips():
    with pytest.raises(ValueError, match=r"data\.source=digits holds images; .* take clips from videos"):
        open_source(DataConfig(16, source="digits", num_frames=4))


def test_splits_of_folders_of_videos(tmp_path):
    for name in ("train/a/one", "test/a/two"):
        write_video(tmp_path / f"{name}.avi", 2)
    assert [Path(p).stem for p in folder_videos(tmp_path, split="test").paths] == ["two"]
    with pytest.raises(FileNotFoundError, match="no videos in val/; it has train, test"):
        folder_videos(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match="is not divided into splits, so it has no 'test'"):
        folder_videos(tmp_path / "train", split="test")
    assert len(folder_videos(tmp_path / "train", split="train")) == 1


class FakeVideoDecoder:
    """The part of torchcodec's decoder that vistok calls, implemented by PyAV."""

    counts_wrongly = False

    def __init__(self, source, *, dimension_order: str, seek_mode: str):
        assert (dimension_order, seek_mode) == ("NHWC", "exact")
        with av.open(source) as container:
            self.frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    def __len__(self) -> int:
        return len(self.frames) + self.counts_wrongly

    def get_frames_at(self, indices: list[int]):
        return SimpleNamespace(data=torch.from_numpy(np.stack([self.frames[index] for index in indices])) // 2)


@pytest.mark.parametrize("counts_wrongly", [False, True])
def test_torchcodec_decodes_where_it_is_there_and_counts_alike(tmp_path, monkeypatch, counts_wrongly):
    from vistok.data import video_decoders

    decoders = SimpleNamespace(VideoDecoder=type("Decoder", (FakeVideoDecoder,), {"counts_wrongly": counts_wrongly}))
    monkeypatch.setattr(video_decoders, "torchcodec", lambda: SimpleNamespace(__version__="0.9", decoders=decoders))
    video = open_video(write_video(tmp_path / "clip.mp4"))
    assert video.decoder.startswith("torchcodec 0.9, frames counted by PyAV")
    brightness = video.read([3, 1]).mean((1, 2, 3))
    expected = np.array([10 + 12 * 3, 10 + 12 * 1]) / (1 if counts_wrongly else 2)
    assert np.allclose(brightness, expected, atol=2)
    with pytest.raises(UnreadableClipError, match="there is no frame 18"):
        video.read([18])
    assert "_frames" not in pickle.loads(pickle.dumps(video)).__dict__
    (tmp_path / "text.mp4").write_text("#EXTM3U")
    with pytest.raises(UnreadableClipError, match=r"text\.mp4"):
        open_video(tmp_path / "text.mp4").read([0])


def test_a_decoder_that_cannot_be_loaded_is_left_alone(monkeypatch):
    from vistok.data.video_decoders import torchcodec

    torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    assert torchcodec() is None
    torchcodec.cache_clear()
