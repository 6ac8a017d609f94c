"""Movies: MP4 and GIF files, contact sheets, and what a notebook plays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.movies import Movie, contact_sheet, save_gif, save_mp4, to_frames
from vistok.data.video_decoders import open_video

pytest.importorskip("av")


def frames(count: int = 6, size: tuple[int, int] = (32, 48), channels: int = 3) -> np.ndarray:
    """Frames (T, H, W, C) that become brighter."""
    return np.stack([np.full((*size, channels), 20 + 20 * number, np.uint8) for number in range(count)])


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_comes_back_nearly_the_same(tmp_path, size, channels):
    made = frames(size=size, channels=channels)
    save_mp4(made, tmp_path / "clip.mp4", fps=7.5)
    read = open_video(tmp_path / "clip.mp4").read(range(6))
    assert read.shape == (6, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(read[:, : size[0], : size[1]].astype(int) - made).max() <= 4


def test_gif_repeats_and_keeps_its_frames(tmp_path):
    save_gif(frames(), tmp_path / "clip.gif", fps=10)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.info["loop"], image.info["duration"]) == (6, 0, 100)


def test_contact_sheet_shows_the_first_and_the_last_frame():
    sheet = contact_sheet([frames(9), frames(5, channels=3)], columns=4)
    assert sheet.size == (4 * 50 - 2, 2 * 34 - 2)
    assert sheet.getpixel((0, 0)) == (20, 20, 20)
    assert sheet.getpixel((3 * 50, 34)) == (100, 100, 100)
    with pytest.raises(ValueError, match="no clips"):
        contact_sheet([])


def test_movies_play_and_are_saved_by_their_extension(tmp_path):
    movie = Movie(to_frames(torch.zeros(1, 1, 4, 16, 16))[0])
    assert movie.frames.shape == (4, 16, 16, 1)
    assert "data:video/mp4;base64," in movie._repr_html_()
    movie.save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif, not as \.avi"):
        movie.save(tmp_path / "a.avi")
    with pytest.raises(ValueError, match="are C and T swapped"):
        to_frames(torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="uint8 frames"):
        save_mp4(np.zeros((2, 8, 8, 3)), tmp_path / "a.mp4")
