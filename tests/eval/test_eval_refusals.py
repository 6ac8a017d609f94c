"""Inputs that evaluation refuses, scores that it warns of, and warnings that are given once."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.eval_data import as_tensor, batch_statistics, smooth_images, write_folder

from vistok.eval import evaluate, evaluate_reconstruction, make_reference
from vistok.eval.images import ImageError
from vistok.eval.metrics import Gaussian, frechet_distance
from vistok.eval.networks import CallableNetwork
from vistok.eval.references import InvalidReferenceError, open_reference
from vistok.eval.sweep import Setting

OWN = {"features": batch_statistics, "network": "colours"}


def gaussian(covariance: torch.Tensor) -> Gaussian:
    return Gaussian(torch.zeros(len(covariance)), covariance)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (-torch.eye(4), "negative eigenvalues"),
        (torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1])), "negative eigenvalues"),
        (torch.eye(4) + torch.eye(4).roll(1, 0), "not symmetric"),
        (torch.eye(4) * (1 + 1j), "complex"),
        (torch.eye(4) * torch.nan, "not finite"),
    ],
)
def test_what_is_no_covariance_has_no_distance(covariance, message):
    for pair in ((gaussian(torch.eye(4)), gaussian(covariance)), (gaussian(covariance), gaussian(torch.eye(4)))):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*pair)


def test_moments_too_large_for_a_distance():
    one, other = (
        gaussian(torch.eye(4).double()),
        Gaussian(torch.full((4,), 1e200, dtype=torch.double), torch.eye(4).double()),
    )
    with pytest.raises(ValueError, match="so large that their distance is not finite"):
        frechet_distance(one, other)


def test_images_of_one_colour_have_a_covariance(tmp_path: Path):
    flat = open_reference(stored(tmp_path / "flat.npz", sigma=np.zeros((4, 4))))
    assert frechet_distance(flat.gaussians["pool"], flat.gaussians["pool"]) == 0


def test_equal_sets_are_at_no_distance():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = Gaussian(rows.mean(0), rows.T.cov())
    assert frechet_distance(one, one) == 0
    images = as_tensor(smooth_images(12, seed=0))
    result = evaluate(images, images, metrics=["fid"], **OWN)
    assert result["scores"]["frechet_distance"] == 0
    assert json.dumps(result["scores"]["frechet_distance"]) == "0.0"


def stored(path: Path, **changes) -> Path:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    arrays = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False), "pool": rows.astype(np.float32)}
    np.savez(path, **(arrays | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": np.full((30, 4), np.nan, np.float32)}, "'pool' .* holds values that are not finite"),
        ({"pool": np.full((30, 4), np.inf)}, "'pool' .* holds values that are not finite"),
        ({"pool": np.zeros((30, 5))}, r"'pool' .* must be real numbers \(n, 4\), got float64 \(30, 5\)"),
        ({"pool": np.zeros(4)}, "'pool' .* must be real numbers"),
        ({"pool": np.zeros((30, 4), complex)}, "'pool' .* must be real numbers"),
        ({"mu": np.zeros(4, complex)}, "'mu' of .* must be real numbers, got complex128"),
        ({"sigma": np.eye(4, dtype=complex)}, "'sigma' of .* must be real numbers"),
        ({"sigma": -np.eye(4)}, "'sigma' of .* is no covariance: it has negative eigenvalues"),
        ({"sigma": np.eye(4) + np.eye(4, k=1)}, "'sigma' of .* not symmetric"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0)), "pool": np.zeros((3, 0))}, r"must be \(D,\) and \(D, D\)"),
        ({"pool": np.full((30, 4), 1e300)}, "'pool' .* holds values that are not finite"),
        ({"mu": np.array(["a"] * 4)}, "'mu' of .* must be real numbers"),
        ({"count": np.array([1, 2])}, "'count' must be one value"),
    ],
)
def test_references_that_are_none(tmp_path: Path, changes: dict, message: str):
    open_reference(stored(tmp_path / "good.npz"))
    with pytest.raises(InvalidReferenceError, match=message):
        open_reference(stored(tmp_path / "bad.npz", **changes))


def test_stored_rows_belong_to_the_hash_and_references_are_not_overwritten(tmp_path: Path):
    network, path = CallableNetwork(batch_statistics, "colours"), tmp_path / "ref.npz"
    make_reference(as_tensor(smooth_images(12, seed=0)), path, network)
    with pytest.raises(FileExistsError, match=r"ref\.npz exists already"):
        make_reference(as_tensor(smooth_images(12, seed=1)), path, network)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["pool"] = arrays["pool"] + 1
    np.savez(path, **arrays)
    with pytest.raises(InvalidReferenceError, match="pooled features do not have the hash that it records"):
        open_reference(path)
    del arrays["rows_sha256"]  # of the version before
    np.savez(path, **arrays)
    assert open_reference(path).rows is not None


def test_a_metric_is_guessed():
    images = as_tensor(smooth_images(4, seed=0))
    with pytest.raises(ValueError, match=r"unknown metric 'FID'; known: fid, .*did you mean 'fid'\?"):
        evaluate(images, images, metrics=["FID"], **OWN)


def test_notes_are_said_once(tmp_path: Path):
    originals = write_folder(tmp_path / "originals", smooth_images(6, seed=0))
    made = write_folder(tmp_path / "made", smooth_images(6, seed=0), extension="jpg")
    for folder in (originals, made):
        (folder / "notes.txt").write_text("x")
    network = CallableNetwork(batch_statistics, "colours")
    notes = evaluate_reconstruction(originals, made, network=network)["warnings"]
    assert len(notes) == len(set(notes))
    for kind in ("lossily compressed", "other file is ignored"):
        sides = [note.partition(":")[0] for note in notes if kind in note]
        assert len(sides) == len(set(sides)) > 0


def test_the_psnr_of_unrelated_folders_is_doubted(tmp_path: Path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    noisy = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    originals = write_folder(tmp_path / "originals", pixels)
    for name, made, doubted in (
        ("true", noisy, False),
        ("false", pixels[::-1], True),
        ("next", noisy[[*range(1, 8), 0]], True),
    ):
        folder = write_folder(tmp_path / name, made)
        for batch_size in (1, 3, 8):
            notes = evaluate_reconstruction(originals, folder, batch_size=batch_size)["warnings"]
            assert any("are these reconstructions of these images" in note for note in notes) == doubted


def test_what_was_read_is_recorded(tmp_path: Path):
    folder = write_folder(tmp_path / "x", smooth_images(4, seed=0))
    Image.fromarray(smooth_images(1, seed=1)[0]).save(folder / "y.webp", lossless=True)
    (folder / "z.heic2").write_bytes(b"x")
    result = evaluate(folder, folder, metrics=["fid"], **OWN)
    assert result["images"]["files"] == {
        "reading": "photo",
        "formats": {".png": 4, ".webp": 1},
        "turned": 0,
        "transparent": 0,
        "deep": 0,
        "left_out": {"count": 1, "names": ["z.heic2"]},
        "splits": None,
    }
    assert result["versions"]["pillow"]
    assert any("1 other file is ignored: z.heic2" in note for note in result["warnings"])


@pytest.mark.parametrize(
    ("values", "doubted"),
    [((-1, 1), False), ((-1.3, 1.3), False), ((0, 1), True), ((0, 255), True), ((0.5, 0.5), False)],
)
def test_float_pixels_of_another_range_are_doubted(values: tuple[float, float], doubted: bool):
    low, high = values
    images = low + (high - low) * torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    real = as_tensor(smooth_images(4, seed=0))
    for result in (evaluate(images, real, metrics=["fid"], **OWN), evaluate_reconstruction(real, images)):
        found = [note for note in result["warnings"] if "float pixels are read as [-1, 1]" in note]
        assert len(found) == doubted


def test_equal_images_are_no_false_reconstructions(tmp_path: Path):
    folder = write_folder(tmp_path / "x", np.full((4, 24, 24, 3), 77, np.uint8))
    notes = evaluate_reconstruction(folder, folder)["warnings"]
    assert not any("are these reconstructions" in note for note in notes)


def test_too_few_images_are_told_before_anything_is_computed(tmp_path: Path):
    network = CallableNetwork(batch_statistics, "colours")
    folder = write_folder(tmp_path / "x", smooth_images(1, seed=0))
    with pytest.raises(ImageError, match=r"rFID needs at least 2 images, and .*x has 1"):
        evaluate_reconstruction(folder, folder, network=network)
    with pytest.raises(ImageError, match=r"at least 2 images, and .*x has 1"):
        make_reference(folder, tmp_path / "ref.npz", network)
    (tmp_path / "none").mkdir()
    with pytest.raises(ImageError, match="no images in"):
        evaluate(tmp_path / "none", folder, **OWN)


def test_a_reference_is_called_npz_before_it_is_made(tmp_path: Path):
    with pytest.raises(ValueError, match=r"call it .*ref\.npz in place of"):
        make_reference(
            as_tensor(smooth_images(4, seed=0)), tmp_path / "ref", CallableNetwork(batch_statistics, "colours")
        )
    assert not list(tmp_path.iterdir())


def test_a_crop_beyond_the_machine_is_refused(tmp_path: Path):
    folder = write_folder(tmp_path / "x", smooth_images(2, seed=0))
    with pytest.raises(ImageError, match=r"1,000,000 x 1,000,000 pixels \(crop=1000000\) would take"):
        evaluate(folder, folder, crop=1_000_000, **OWN)


def test_a_protocol_is_guessed_and_no_metric_is_none():
    images = as_tensor(smooth_images(4, seed=0))
    for wrong, meant in (("torch-fidelty", "torch-fidelity"), ("ADM", "adm"), ("perturbtion", "perturbation")):
        with pytest.raises(ValueError, match=f"unknown protocol .*did you mean '{meant}'"):
            evaluate(images, images, protocol=wrong)
    with pytest.raises(ValueError, match="no metric is named; known: fid"):
        evaluate(images, images, metrics=[], **OWN)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int64, bool, object])
def test_images_of_an_npz_are_8_bit(tmp_path: Path, dtype: type):
    np.savez(tmp_path / "x.npz", np.zeros((4, 24, 24, 3), dtype))
    with pytest.raises(ImageError, match=r"'arr_0' of .*x\.npz is .*expected row-major uint8 \(N, H, W, 3\)"):
        evaluate(tmp_path / "x.npz", tmp_path / "x.npz", **OWN)


def test_near_scales_have_folders_of_their_own():
    settings = Setting.over([1.5, 1.5000001, 2], [0.9, 0.90000001], {})
    assert len({setting.folder for setting in settings}) == len(settings)
    assert settings[0].folder == "guidance-1.5-temperature-0.9"


@pytest.mark.parametrize("member", ["mu.npy", "count.npy", "pool.npy"])
def test_a_member_that_is_no_array(tmp_path: Path, member):
    path = tmp_path / "odd.npz"
    np.savez(path, sigma=np.eye(4))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "text")
    with pytest.raises(InvalidReferenceError, match=f"odd.npz is damaged: its member '{member[:-4]}' is no array"):
        open_reference(path)


@pytest.mark.parametrize(("recorded", "asked"), [(None, 16), (0, 16), (16, 24)])
def test_statistics_cannot_be_cropped(tmp_path: Path, recorded, asked):
    changes = {} if recorded is None else {"crop": np.array(recorded)}
    path = stored(tmp_path / "statistics.npz", **changes)
    with pytest.raises(InvalidReferenceError, match=f"cannot be cropped to {asked}: they were made with"):
        open_reference(path, crop=asked)
    assert "pool" in open_reference(path, crop=recorded).gaussians
