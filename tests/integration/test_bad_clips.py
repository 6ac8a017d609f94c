"""Errors for bad clips are raised where they enter: in tokenizers, folders and the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import tiny

from vistok.cli import main
from vistok.data.config import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.movies import mp4_bytes, save_mp4, to_frames
from vistok.data.opening import open_source
from vistok.data.video_decoders import open_video
from vistok.pipelines.samples import reconstruct_files

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("larp", image_size=16)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    """A saved tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def fails(capsys, *arguments) -> str:
    """The message with which the command line ends."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (lambda clips: clips.transpose(1, 2), r"reads 3 channels, got 4; time comes first in \(4, 3, 16, 16\)"),
        (lambda clips: clips.movedim(1, -1), r"reads 3 channels, got 4; the channels come last in \(4, 16, 16, 3\)"),
        (lambda clips: clips[:, :1], "got 1; repeat the grey channel"),
        (lambda clips: clips.expand(-1, -1, -1, -1, 16)[..., :15], r"4x16x16 only, got 4x16x15"),
        (lambda clips: clips[:, :, :3], "a multiple of 2, got 3"),
        (lambda clips: clips[:, :, 0], "pixels must be"),
    ],
)
def test_tokenizers_name_axes_that_are_swapped(tokenizer, swap, message):
    clips = torch.zeros(2, 3, 4, 16, 16)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(swap(clips))


def test_swapped_clips_are_no_movies():
    with pytest.raises(ValueError, match="are C and T swapped"):
        to_frames(torch.zeros(2, 4, 3, 16, 16))


def test_grey_transparent_and_odd_videos_are_read(tokenizer, tmp_path):
    grey = np.full((6, 17, 23, 1), 90, np.uint8)
    save_mp4(grey, tmp_path / "grey.mp4")
    with av.open(str(tmp_path / "alpha.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = 26, 18, "yuva420p"
        for _ in range(6):
            frame = np.full((18, 26, 4), (200, 60, 60, 128), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(6):
        Image.new("LA", (21, 19), (90, 128)).save(frames / f"{number}.png")
    for path, size in (("grey.mp4", (18, 24)), ("alpha.webm", (18, 26)), ("frames", (19, 21))):
        assert open_video(tmp_path / path).read([0, 5]).shape == (2, *size, 3)
    data = DataConfig(16, source="videos", root=str(tmp_path), split=None, num_frames=4, batch_size=3, channels=3)
    (batch,) = evaluation_loader(open_source(data), data)
    assert batch.pixels.shape == (3, 3, 4, 16, 16)
    assert tokenizer.encode(batch.pixels).shape == (3, tokenizer.num_tokens)
    scores = reconstruct_files(tokenizer, [tmp_path / "grey.mp4", frames], tmp_path / "out.png")
    assert len(scores) == 2


def test_a_folder_of_videos_is_reconstructed(run, tmp_path, capsys):
    (tmp_path / "videos" / "frames").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / "videos" / "frames" / f"{number}.png")
    (tmp_path / "videos" / "clip.mp4").write_bytes(mp4_bytes(np.zeros((4, 16, 16, 3), np.uint8)))
    for folder, count in (("videos", 2), ("videos/frames", 1)):
        with pytest.raises(SystemExit, match="0"):
            main(["reconstruct", str(run), str(tmp_path / folder), "--out", str(tmp_path / "out.png")])
        assert capsys.readouterr().out.count("PSNR") == count
    (tmp_path / "empty").mkdir()
    assert "there are no videos in" in fails(capsys, "reconstruct", run, tmp_path / "empty")


def test_folders_without_clips_are_named(run, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "empty").mkdir()
    section = ["data.source=videos", f"data.root={tmp_path / 'empty'}", "data.split=null", "data.num_frames=4"]
    message = fails(capsys, "tokenize", run, *section, "data.image_size=16", "--out", tmp_path / "tokens")
    assert f"no videos in {tmp_path / 'empty'}" in message
    assert ".mp4" in message
    message = fails(capsys, "tokenize", run, *section, "data.image_size=16", "data.root=absent", "--out", "tokens")
    assert "there is no folder absent of videos" in message


def test_clips_that_are_too_short_are_counted_and_named(tmp_path):
    for number, length in enumerate((9, 2, 9)):
        save_mp4(np.full((length, 16, 16, 3), 90, np.uint8), tmp_path / f"{number}.mp4")
    data = DataConfig(16, source="videos", root=str(tmp_path), split=None, num_frames=4, short_clips="refuse")
    with pytest.raises(ValueError, match=r"(?s)1 of 3 .*1\.mp4: it has 2 frames, fewer than the 4"):
        list(evaluation_loader(open_source(data), data))


def test_a_missing_decoder_is_said_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "clip.mp4").write_bytes(mp4_bytes(np.zeros((4, 16, 16, 3), np.uint8)))
    monkeypatch.setitem(sys.modules, "av", None)
    message = fails(capsys, "reconstruct", run, tmp_path / "clip.mp4", "--out", tmp_path / "out.png")
    assert "pip install 'vistok[video]'" in message
