"""Pictures: grids, comparisons, PNG and .npz files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.pictures import comparison, from_pil, grid, npz_writer, open_picture, save_png, to_pil


def plain(levels: list[float], channels: int = 3) -> torch.Tensor:
    """Images of 2x2 of one level each."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, channels, 2, 2)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_8_bit_images_survive_the_round_trip(channels, mode):
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, channels, 16, 16).to(torch.uint8)
    [image] = to_pil(levels.float() / 127.5 - 1)
    assert image.mode == mode
    assert np.array_equal(np.asarray(image).reshape(16, 16, channels)[..., 0], levels[0, 0].numpy())
    assert torch.equal(from_pil([image], (16, 16), channels), levels.float() / 127.5 - 1)


def test_pixels_that_make_no_picture_are_refused():
    with pytest.raises(ValueError, match=r"got shape \(2, 2, 4, 4\)"):
        to_pil(torch.zeros(2, 2, 4, 4))
    pixels = torch.zeros(1, 3, 2, 2)
    pixels[0, 1, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 12 pixel values are NaN"):
        to_pil(pixels)


def test_grid_lays_out_row_by_row():
    sheet = np.asarray(grid(to_pil(plain([-1.0, 0.0, 1.0], channels=1)), columns=2))
    assert sheet.shape == (6, 6)
    assert (sheet[:2, :2] == 0).all()
    assert (sheet[:2, 4:] == 128).all()
    assert (sheet[4:, :2] == 255).all()
    assert (sheet[2:4] == 255).all(), "lines between images are white"
    with pytest.raises(ValueError, match="images of one size"):
        grid([Image.new("L", (2, 2)), Image.new("L", (3, 2))])
    with pytest.raises(ValueError, match="no images"):
        grid([])


def test_comparison_puts_each_original_over_its_reconstruction():
    originals, reconstructions = plain([-1.0, -0.5, 0.0]), plain([0.25, 0.5, 0.75])
    sheet = np.asarray(comparison(originals, reconstructions, columns=2))[..., 0]
    cells = sheet[::4, ::4]  # one pixel of each image
    assert cells.tolist() == [[0, 64], [159, 191], [128, 255], [223, 255]]
    with pytest.raises(ValueError, match="3 originals do not pair with 2"):
        comparison(originals, reconstructions[:2])


def test_npz_holds_all_images_or_is_not_there(tmp_path: Path):
    images = to_pil(plain([-1.0, 0.0, 1.0], channels=1))
    with npz_writer(tmp_path / "a.npz", 3) as writer:
        writer.write(images[:1])
        writer.write(images[1:])
    assert np.load(tmp_path / "a.npz")["arr_0"][:, 0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    with (
        pytest.raises(ValueError, match="3 images were announced, 2 were written"),
        npz_writer(tmp_path / "b.npz", 3) as writer,
    ):
        writer.write(images[:2])
    with pytest.raises(ValueError, match="one size"), npz_writer(tmp_path / "b.npz", 2) as writer:
        writer.write([images[0], Image.new("L", (3, 3))])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_failed_png_keeps_the_old_one(tmp_path: Path, monkeypatch):
    save_png(Image.new("L", (2, 2)), tmp_path / "a.png")

    def disk_full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_png(Image.new("L", (4, 4)), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert open_picture(tmp_path / "a.png").size == (2, 2)


def test_truncated_pictures_are_named(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    save_png(Image.fromarray(noise), tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        open_picture(tmp_path / "a.png")
