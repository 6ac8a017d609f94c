"""Grids with labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from vistok.data.pictures import GAP
from vistok.data.sheets import LINE, TEXT, enlarged, enlargement, sheet, shortened, wrapped
from vistok.pipelines.display import overview


def grey(level: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("L", size, level)


def test_images_keep_their_order_and_pixels_under_their_labels():
    images = [grey(level) for level in (10, 20, 30, 40, 50, 60)]
    drawn = np.asarray(sheet(images, 3, column_labels=("a", "b", "c"), least=32))
    assert drawn.shape == (LINE + 2 * 32 + GAP, 3 * 32 + 2 * GAP, 3)
    centres = [
        drawn[LINE + 16 + row * (32 + GAP), 16 + column * (32 + GAP), 0] for row in (0, 1) for column in range(3)
    ]
    assert centres == [10, 20, 30, 40, 50, 60]
    assert drawn[:LINE].min() < 100  # letters


def test_rows_and_images_have_labels_of_their_own():
    images = [grey(0)] * 4
    plain = sheet(images, 2, least=16)
    assert plain.size == (2 * 16 + GAP, 2 * 16 + GAP)
    assert sheet(images, 2, row_labels=("one", "two"), least=16).height == plain.height
    assert sheet(images, 2, row_labels=("one", "two"), least=16).width > plain.width
    assert sheet(images, 2, labels=["x"] * 4, least=16).height == plain.height + 2 * LINE


def test_small_images_are_enlarged_without_a_blur():
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    assert np.array_equal(np.asarray(enlarged(image, 3)), [[0, 0, 0, 255, 255, 255]] * 3)
    assert [enlargement(grey(0, size), 128) for size in ((32, 32), (100, 60), (256, 256))] == [4, 2, 1]


def test_long_labels_are_cut_to_their_image():
    font = ImageFont.load_default(TEXT)
    cut = shortened("a very long name of a class", 64, font)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 64
    assert shortened("cat", 64, font) == "cat"


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 labels do not name 3 columns"):
        sheet([grey(0)] * 3, 3, column_labels=("a", "b"))
    with pytest.raises(ValueError, match="images of one size"):
        sheet([grey(0), grey(0, (8, 8))])
    with pytest.raises(ValueError, match="no images"):
        sheet([])


def test_classes_that_take_turns_get_a_column_each():
    images = [grey(level) for level in range(6)]
    assert overview(images, ["a", "b"] * 3).size == (2 * 64 + GAP, LINE + 3 * 64 + 2 * GAP)
    assert overview(images, ["a", "b", "c", "d", "e", "f", "g"]).size[0] == 6 * 64 + 5 * GAP  # the seventh is not shown
    blocks = overview(images, ["a", "a", "a", "b", "b", "b"])
    assert blocks.size == (2 * 64 + GAP, LINE + 3 * 64 + 2 * GAP)
    assert [blocks.getpixel((x, y))[0] for y in (40, 110, 180) for x in (30, 90)] == [0, 3, 1, 4, 2, 5]
    assert overview(images, ["a", "a", "b", "b", "a", "b"]).size == (3 * 64 + 2 * GAP, 2 * (64 + LINE) + GAP)
    assert overview(images).size == (3 * 64 + 2 * GAP, 2 * 64 + GAP)


def test_labels_take_lines_before_they_are_cut():
    font = ImageFont.load_default(TEXT)
    assert wrapped("cat", 64, font) == ["cat"]
    assert wrapped("draw a seven", 64, font) == ["draw a", "seven"]
    many = wrapped("a photo of a very long name of a class", 64, font)
    assert len(many) == 3
    assert many[-1].endswith("…")
    assert all(font.getlength(line) <= 64 for line in many)
    assert wrapped("", 64, font) == [""]
    plain = sheet([Image.new("L", (64, 64))] * 2, 2, column_labels=("cat", "dog"))
    tall = sheet([Image.new("L", (64, 64))] * 2, 2, column_labels=("cat", "draw a seven"))
    assert tall.height == plain.height + LINE
