"""Video files from practice: other frame orders, edit lists, upright phone videos, and files without video."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vistok.data.clips import ClipTransform
from vistok.data.video_decoders import open_video
from vistok.data.video_files import folder_videos, survey
from vistok.data.videos import UnreadableClipError

av = pytest.importorskip("av")


def ramp(count: int) -> np.ndarray:
    """Frames (T, 32, 48, 3) that get brighter, white at the top."""
    frames = np.zeros((count, 32, 48, 3), np.uint8) + np.linspace(20, 220, count).astype(np.uint8)[:, None, None, None]
    frames[:, :8] = 255
    return frames


def write(path: Path, count: int, *, codec: str = "libx264", between: int = 0, early: int = 0, **options) -> Path:
    """A file of ``count`` frames, with B-frames between others; ``early`` frames lie before its beginning."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.bit_rate, stream.codec_context.max_b_frames = 4_000_000, between
        for number, pixels in enumerate([*ramp(count), None]):
            frame = None if pixels is None else av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if frame is not None:
                frame.pts, frame.time_base = number, Fraction(1, 10)
            for packet in stream.encode(frame):
                packet.pts -= early
                packet.dts -= early
                container.mux(packet)
    return path


def brightness(frames: np.ndarray) -> np.ndarray:
    """Brightness of the lower half of each frame."""
    return frames[:, 16:].mean((1, 2, 3))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_of_avi_files_come_in_the_order_in_which_they_are_shown(tmp_path, codec):
    video = open_video(write(tmp_path / "clip.avi", 24, codec=codec, between=2))
    assert len(video) == 24
    written = brightness(ramp(24))
    assert brightness(video.read(range(24))) == pytest.approx(written, abs=4)  # neighbours differ by 8
    assert brightness(video.read([20, 3])) == pytest.approx(written[[20, 3]], abs=4)


def test_frames_that_an_edit_list_leaves_out_do_not_count(tmp_path):
    whole = open_video(write(tmp_path / "whole.mp4", 12))
    cut = open_video(write(tmp_path / "cut.mp4", 12, early=3, use_editlist="1"))
    with av.open(str(tmp_path / "cut.mp4")) as container:
        hidden = sum(packet.is_discard for packet in container.demux(container.streams.video[0]))
    assert hidden
    assert len(cut) == 12 - hidden
    assert np.array_equal(cut.read(range(len(cut))), whole.read(range(hidden, 12)))


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)], ids=["right", "over", "left"]
)
def test_what_was_filmed_upright_stands_upright(tmp_path, matrix, turns):
    plain = write(tmp_path / "plain.mp4", 4)
    a, b, c, d = (value << 16 for value in matrix)
    content = bytearray(plain.read_bytes())
    begin = content.find(b"tkhd") + 44  # its matrix, of numbers with 16 bits after the point
    content[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    turned = open_video(tmp_path / "turned.mp4").read([0, 3])
    assert np.array_equal(turned, np.rot90(open_video(plain).read([0, 3]), turns, axes=(1, 2)))


def test_what_holds_no_video_is_counted_and_named(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        for frame in (sound, None):
            container.mux(stream.encode(frame))
    with av.open(str(tmp_path / "zero.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    (tmp_path / "empty.mp4").touch()
    write(tmp_path / "good.mp4", 5)
    (tmp_path / "tail.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-300])
    found = survey(folder_videos(tmp_path), ClipTransform(4, 16))
    reasons = {Path(name).stem: reason for name, reason in found.unreadable.items()}
    assert reasons.keys() == {"sound", "zero", "empty", "tail"}
    assert reasons["sound"] == "it holds no video stream, but audio"
    assert reasons["zero"] == "it holds no video stream, but nothing"
    assert reasons["empty"].startswith("it cannot be opened as mp4: ")
    assert sorted(found.lengths) == [0, 0, 0, 0, 5]


def test_a_video_whose_frames_change_their_size_is_named(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        other = av.CodecContext.create("mjpeg", "w")
        other.width, other.height, other.pix_fmt, other.time_base = 32, 16, "yuvj420p", Fraction(1, 10)
        for number, (encoder, size) in enumerate([(stream, (32, 48)), (other, (16, 32))]):
            frame = av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            for packet in encoder.encode(frame):
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
                container.mux(packet)
    with pytest.raises(UnreadableClipError, match=r"unlike sizes: \[\(16, 32\), \(32, 48\)\]"):
        open_video(tmp_path / "clip.mkv").read([0, 1])
