"""Evaluation: metrics against independent formulas, protocols against torch-fidelity, errors for bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.eval_data import (
    FakeInception,
    as_tensor,
    batch_statistics,
    colour_statistics,
    inception_weights,
    smooth_images,
    write_folder,
)

from vistok.checkpoints import CheckpointError
from vistok.data.pictures import to_uint8
from vistok.eval import evaluate, evaluate_reconstruction, make_reference, networks
from vistok.eval import metrics as m
from vistok.eval.batches import NETWORK_BATCH, filled, regrouped
from vistok.eval.features import RowStore
from vistok.eval.images import FolderImages, ImageError, NpzImages, open_images
from vistok.eval.networks import CallableNetwork, InceptionV3Compat
from vistok.eval.protocols import PROTOCOLS
from vistok.eval.reconstruction import SSIM_VARIANTS, psnr, ssim
from vistok.eval.references import InvalidReferenceError, open_reference

torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------------------------
# Images and networks to score with


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return inception_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    """Twelve generated and ten real images as PNG folders."""
    root = tmp_path_factory.mktemp("sets")
    generated, real = smooth_images(12, seed=1), smooth_images(10, seed=2, contrast=60, brightness=150)
    return SimpleNamespace(
        generated=write_folder(root / "generated", generated),
        real=write_folder(root / "real", real),
        generated_pixels=generated,
        real_pixels=real,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_moments_equal_numpys_however_the_set_is_split_and_merged(seed, sizes):
    features = np.random.default_rng(seed).normal(3, 2, (sum(sizes), 5)).astype(np.float32)
    parts = torch.from_numpy(features).split(sizes)
    streamed = m.Moments(5)
    for part in parts[1:]:
        streamed.update(part)
    merged = m.Moments.of(parts[0]).merge(streamed)
    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    assert streamed.count == len(features) - sizes[0]  # merging changes neither side


def nuclear_norm_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two feature sets without covariances: tr sqrt(A B) is the nuclear norm of X_a X_b^T."""
    centred_a, centred_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(centred_a @ centred_b.T).sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + centred_a.square().sum() + centred_b.square().sum() - 2 * cross)


@pytest.mark.parametrize("count", [200, 12])  # more and fewer samples than features
def test_frechet_distance_equals_the_nuclear_norm_form(count):
    generator = torch.Generator().manual_seed(count)
    mixing = torch.randn(30, 30, generator=generator).double()
    a = torch.randn(count, 30, generator=generator).double() @ mixing
    b = torch.randn(count + 5, 30, generator=generator).double() @ mixing.T + 0.3
    got = m.frechet_distance(m.Moments.of(a).gaussian, m.Moments.of(b).gaussian)
    assert got == pytest.approx(nuclear_norm_distance(a, b), rel=1e-9)


def test_frechet_distance_of_a_set_with_itself_is_zero_and_of_a_shift_its_square():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).double()
    gaussian = m.Moments.of(features).gaussian
    assert m.frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-10)
    shifted = m.Moments.of(features + 0.5).gaussian
    assert m.frechet_distance(gaussian, shifted) == pytest.approx(8 * 0.25, rel=1e-9)


def test_frechet_distance_refuses_other_widths_and_nan():
    narrow, wide = m.Moments.of(torch.rand(9, 3)).gaussian, m.Moments.of(torch.rand(9, 4)).gaussian
    with pytest.raises(ValueError, match="widths differ: 3 and 4"):
        m.frechet_distance(narrow, wide)
    with pytest.raises(ValueError, match="not finite"):
        m.frechet_distance(narrow, narrow._replace(mean=narrow.mean * torch.nan))


def test_frechet_distance_is_torch_fidelitys_where_covariances_have_full_rank():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    generator = torch.Generator().manual_seed(0)
    a, b = (scale * torch.rand(90, 40, generator=generator) for scale in (1, 1.1))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    ours = m.frechet_distance(m.Moments.of(a).gaussian, m.Moments.of(b).gaussian)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_inception_score_of_certain_balanced_classes_is_their_number_and_depends_on_the_order():
    labels = torch.arange(10).repeat_interleave(20)
    logits = 200.0 * torch.eye(10)[labels]  # logits so large that the other probabilities underflow in float32
    sorted_by_class = m.inception_score(logits, m.split_into_chunks(200, 40))
    assert sorted_by_class.mean == pytest.approx(2)  # two classes in every chunk
    assert m.inception_score(logits, m.split_into_chunks(200, 5000)).mean == pytest.approx(10)
    assert m.inception_score(m.shuffled(logits), m.split_into_chunks(200, 40)).mean > 8


def test_a_short_last_chunk_is_a_chunk():
    assert m.split_into_chunks(11, 5) == [slice(0, 5), slice(5, 10), slice(10, 11)]
    with pytest.raises(ValueError, match="10 splits need at least 10 samples, got 9"):
        m.split_evenly(9, 10)


def brute_force_precision(generated: torch.Tensor, real: torch.Tensor, k: int) -> float:
    inside = 0
    for sample in generated:
        inside += any(
            (sample - centre).square().sum() <= (real - centre).square().sum(1).sort().values[k] for centre in real
        )
    return inside / len(generated)


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
def test_precision_and_recall_equal_brute_force_for_every_block_size(distance):
    generator = torch.Generator().manual_seed(3)
    generated = torch.randn(23, 2, generator=generator)
    real = torch.randn(31, 2, generator=generator) * 0.6 + 0.8
    expected = brute_force_precision(generated, real, 3), brute_force_precision(real, generated, 3)
    assert expected[0] != expected[1]  # so that the test fails if the two are swapped
    assert 0 < min(expected) < max(expected) < 1
    for block in (4, 10, 1000):
        assert m.precision_recall(generated, real, distance=distance, block=block) == pytest.approx(expected)


def test_float16_distances_are_coarse_and_fall_back_to_float32_where_they_overflow():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, 300, generator=generator) * 2
    exact = m.pairwise_distance(features, features, "squared_euclidean")
    coarse = m.pairwise_distance(features, features, "squared_euclidean_float16")
    assert coarse.dtype == torch.float16
    torch.testing.assert_close(coarse.float(), exact, atol=2.0, rtol=0)  # near 400, float16 has steps of 0.25
    huge = features * 100  # squared norms beyond 65504
    assert torch.equal(
        m.pairwise_distance(huge, huge, "squared_euclidean_float16"),
        m.pairwise_distance(huge, huge, "squared_euclidean"),
    )


def test_metrics_refuse_sets_that_are_too_small():
    features = torch.rand(3, 4)
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        m.manifold_radii(features)
    with pytest.raises(ValueError, match=r"subsets of 1000 .* got 3 and 3"):
        m.kernel_distance(features, features)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        m.kernel_distance(features, features, subset_size=1)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = m.Moments.of(features[:1]).covariance


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def test_eight_bit_images_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_to_uint8_refuses_nan_and_integers():
    with pytest.raises(ValueError, match="1 of 2 pixel values are NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), noise=st.floats(0.01, 0.3))
def test_ssim_is_one_for_equal_images_symmetric_and_below_one_otherwise(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 16, 18, generator=generator)
    y = (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    for variant in SSIM_VARIANTS:
        torch.testing.assert_close(ssim(x, x, variant), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(ssim(x, y, variant), ssim(y, x, variant))
        assert (ssim(x, y, variant) < 1).all()


def test_psnr_of_a_uniform_error_and_of_equal_images():
    x = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(psnr(x, x + 0.1), torch.full((2,), 20.0, dtype=torch.float64), atol=1e-5, rtol=0)
    assert psnr(x, x).isinf().all()


def test_scores_of_pairs_refuse_other_shapes_small_images_and_unknown_variants():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) and \(1, 3, 8, 8\)"):
        psnr(x, x[:1])
    with pytest.raises(ValueError, match="11x11 window"):
        ssim(x, x, "ssim_gaussian")
    with pytest.raises(ValueError, match="unknown SSIM variant 'ssim2'; known: ssim, ssim_llamagen"):
        ssim(x, x, "ssim2")


def test_reconstruction_scores_of_folders_equal_those_of_tensors_and_are_written(tmp_path):
    originals = smooth_images(7, seed=3)
    noise = np.random.default_rng(0).integers(-9, 10, originals.shape)
    restored = np.clip(originals.astype(int) + noise, 0, 255).astype(np.uint8)
    a, b = write_folder(tmp_path / "a", originals), write_folder(tmp_path / "b", restored)
    by_folder = evaluate_reconstruction(a, b, batch_size=3, out=tmp_path / "out")
    by_tensor = evaluate_reconstruction(as_tensor(originals), as_tensor(restored))
    assert by_folder["scores"] == pytest.approx(by_tensor["scores"], rel=1e-12)
    error = ((originals.astype(float) - restored) / 255) ** 2
    assert by_folder["scores"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(error.mean((1, 2, 3)))))
    assert by_folder["scores"]["psnr_of_mean_mse"] == pytest.approx(-10 * np.log10(error.mean()))
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == by_folder
    assert by_folder["warnings"] == []


def test_reconstruction_with_a_perceptual_distance_names_its_network():
    from vistok.losses import LPIPS

    originals, restored = as_tensor(smooth_images(3, seed=3)), as_tensor(smooth_images(3, seed=4))
    lpips = LPIPS()
    result = evaluate_reconstruction(originals, restored, lpips=lpips, batch_size=2)
    assert result["settings"]["lpips"]["network"] == "vgg16"
    expected = lpips(restored.float() / 127.5 - 1, originals.float() / 127.5 - 1).mean()
    assert result["scores"]["lpips"] == pytest.approx(float(expected), rel=1e-5)


def test_reconstruction_reports_equal_images_and_refuses_sets_that_do_not_pair_up(tmp_path):
    images = smooth_images(4, seed=0)
    result = evaluate_reconstruction(as_tensor(images), as_tensor(images), out=tmp_path)
    assert result["scores"]["psnr"] is None
    assert any("4 of 4 reconstructions equal" in warning for warning in result["warnings"])
    with pytest.raises(ImageError, match=r"4 originals, .* 3 reconstructions"):
        evaluate_reconstruction(as_tensor(images), as_tensor(images[:3]))
    with pytest.raises(ImageError, match=r"originals are 24x24 .* reconstructions 12x24"):
        evaluate_reconstruction(as_tensor(images), as_tensor(images[:, ::2]))


def test_reconstruction_of_tiny_images_leaves_out_windows_that_do_not_fit():
    images = as_tensor(smooth_images(2, seed=0, size=8))
    result = evaluate_reconstruction(images, 255 - images)
    assert "ssim" in result["scores"]
    assert "ssim_gaussian" not in {**result["scores"], **result["settings"]}


def test_reconstruction_warns_when_file_names_do_not_match(tmp_path):
    images = smooth_images(2, seed=0)
    a, b = write_folder(tmp_path / "a", images), write_folder(tmp_path / "b", images)
    (b / "0000.png").rename(b / "cat.png")
    warnings = evaluate_reconstruction(a, b)["warnings"]
    assert any("'0000' with '0001'" in warning for warning in warnings)


# ---------------------------------------------------------------------------------------------------------------------
# Image sets


def test_folder_npz_and_tensor_are_read_alike(tmp_path):
    pixels = smooth_images(5, seed=0)
    np.savez(tmp_path / "plain.npz", pixels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels, arr_1=np.arange(5))
    sources = (
        write_folder(tmp_path / "images", pixels),
        tmp_path / "plain.npz",
        tmp_path / "packed.npz",
        as_tensor(pixels),
        as_tensor(pixels).float() / 127.5 - 1,
    )
    for source in sources:
        images = open_images(source)
        assert (images.count, images.size, images.lossy) == (5, (24, 24), 0)
        batches = list(images.batches(2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat(batches), as_tensor(pixels))


def test_grey_tensors_become_rgb():
    grey = as_tensor(smooth_images(3, seed=0))[:, :1]
    assert torch.equal(next(open_images(grey).batches(3)), grey.repeat(1, 3, 1, 1))


def test_a_folder_is_read_in_path_order_with_its_sub_folders(tmp_path):
    pixels = smooth_images(3, seed=0)
    write_folder(tmp_path / "b", pixels[:1])
    write_folder(tmp_path / "a", pixels[1:], extension="jpg")
    Image.fromarray(pixels[0, :4]).save(tmp_path / "grid.png")  # the overview that sampling writes, beside its record
    (tmp_path / "samples.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not an image")
    images = FolderImages(tmp_path)
    assert images.names == ["a/0000", "a/0001", "b/0000"]
    assert images.lossy == 2
    assert torch.equal(next(images.batches(3))[2], as_tensor(pixels)[0])


def test_the_samples_of_a_run_are_read_not_its_previews(tmp_path):
    run = tmp_path / "run"
    write_folder(run / "previews", smooth_images(2, seed=0))
    (run / "metrics.jsonl").touch()
    with pytest.raises(ImageError, match="has no samples yet; make some with: vistok sample"):
        open_images(run)
    write_folder(run / "samples", smooth_images(3, seed=1))
    assert open_images(run).count == 3


def test_bad_image_sets_are_refused_with_the_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"no images in .*empty; expected \.png, \.jpg, \.jpeg"):
        open_images(tmp_path / "empty")
    with pytest.raises(ImageError, match=r"there is no folder or file .*absent"):
        open_images(tmp_path / "absent")
    (tmp_path / "film.mp4").touch()
    with pytest.raises(ImageError, match=r"cannot read images from .*film\.mp4"):
        open_images(tmp_path / "film.mp4")

    mixed = write_folder(tmp_path / "mixed", smooth_images(2, seed=0))
    Image.new("RGB", (9, 7)).save(mixed / "0002.png")
    with pytest.raises(ImageError, match=r"0000\.png is 24x24 .*0002\.png is 7x9"):
        open_images(mixed)

    broken = write_folder(tmp_path / "broken", smooth_images(2, seed=0))
    (broken / "0001.png").write_bytes((broken / "0001.png").read_bytes()[:200])
    with pytest.raises(ImageError, match=r"cannot read the image .*0001\.png"):
        list(open_images(broken).batches(2))

    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep" / "0.png")
    assert int(next(open_images(tmp_path / "deep").batches(1)).unique()) == 40_000 >> 8
    with pytest.raises(ImageError, match=r"0\.png: it has more than 8 bits per channel"):
        list(open_images(tmp_path / "deep", reading="raw").batches(1))
    with pytest.raises(ImageError, match="crop must be at least 1 pixel, got 0"):
        open_images(mixed, crop=0)

    with pytest.raises(ImageError, match="pixel values are NaN"):
        open_images(torch.full((1, 3, 4, 4), torch.nan))
    with pytest.raises(ImageError, match=r"\(N, 1 or 3, H, W\) with N > 0, got \(0, 3, 4, 4\)"):
        open_images(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, "no array 'arr_0' .* it holds: images"),
        ({"arr_0": np.zeros((1, 4, 4, 3), np.float32)}, "float32 .* expected row-major uint8"),
        ({"arr_0": np.zeros((1, 3, 4, 4), np.uint8)}, r"\(1, 3, 4, 4\); expected row-major uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "column-major"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
    ],
)
def test_npz_files_that_are_no_adm_batches_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "batch.npz", **arrays)
    with pytest.raises(ImageError, match=message):
        NpzImages(tmp_path / "batch.npz")


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", smooth_images(2, seed=0))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    with pytest.raises(ImageError, match=r"half\.npz is not a readable \.npz"):
        open_images(tmp_path / "half.npz")


# ---------------------------------------------------------------------------------------------------------------------
# Protocols


def test_a_result_records_what_the_score_depends_on(monkeypatch, folders, tmp_path):
    monkeypatch.setattr(InceptionV3Compat, "load", lambda weights, resize, device: FakeInception(resize))
    result = evaluate(folders.generated, folders.real, out=tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["protocol"] == "torch-fidelity"
    assert result["network"] == {
        "name": "inception-v3-compat",
        "weights_sha256": "a" * 64,
        "resize": "tf1-bilinear",
        "uint8": "files as stored; float pixels in [-1, 1] by 127.5 x + 128, truncated",
        "dtype": "float32",
        "tf32": False,
    }
    assert (result["images"]["count"], result["reference"]["count"]) == (12, 10)
    assert result["reference"]["source"] == str(folders.real)
    assert result["settings"]["kid"]["subset_size"] == 10
    assert result["settings"]["prc"] == {
        "features": "pool of the same network",
        "neighbours": 3,
        "distance": "euclidean",
        "boundary": "included",
        "images": [12, 10],
    }
    text = "\n".join(result["warnings"])
    for expected in ("only 12 images", "not the published file", "subsets of 10"):
        assert expected in text


@pytest.mark.parametrize("batch_size", [1, 7, 32, 50])
def test_no_batch_size_changes_a_score(batch_size):
    images, real = as_tensor(smooth_images(53, seed=1)), as_tensor(smooth_images(40, seed=2, contrast=60))
    options = {"features": batch_statistics, "network": "colours"}
    result = evaluate(images, real, batch_size=batch_size, **options)
    expected = evaluate(images, real, batch_size=64, **options)
    assert result["scores"] == expected["scores"]  # to the last bit
    assert result["images"]["fingerprint"] == expected["images"]["fingerprint"]
    assert result["images"]["fingerprint"] != result["reference"]["fingerprint"]


def test_batches_of_one_shape_keep_all_rows_in_order():
    rows = torch.arange(50)
    batches = list(regrouped(rows.split([1, 20, 3, 26]), 8))
    assert torch.equal(torch.cat(batches), rows)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 8, 2]
    assert torch.equal(filled(rows[48:]), torch.tensor([48] + [49] * (NETWORK_BATCH - 1)))
    assert torch.equal(filled(rows[:NETWORK_BATCH]), rows[:NETWORK_BATCH])
    assert list(regrouped([], 8)) == []


def test_the_kernel_distance_is_torch_fidelitys_in_float64():
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(40, 16, generator=generator).double(), torch.rand(30, 16, generator=generator).double()
    sizes = {"kid_subsets": 7, "kid_subset_size": 20, "rng_seed": 5, "verbose": False}
    kernels = (
        (m.PolynomialKernel(), {"kid_kernel": "poly"}),
        (m.PolynomialKernel(2, 0.5, 0.1), {"kid_kernel": "poly", "kid_kernel_poly_degree": 2,
                                           "kid_kernel_poly_gamma": 0.5, "kid_kernel_poly_coef0": 0.1}),
        (m.GaussianKernel(0.7), {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 0.7}),
    )  # fmt: skip
    for kernel, options in kernels:
        got = m.kernel_distance(a.float(), b.float(), kernel=kernel, subsets=7, subset_size=20, seed=5)
        expected = kid_features_to_metric(a.float().double(), b.float().double(), **sizes, **options)
        assert got == pytest.approx(tuple(expected.values()), rel=1e-9), kernel
        # Rounding errors of a network do not show.
        noise = 1 + 1e-7 * torch.randn(a.shape, generator=generator)
        shaken = m.kernel_distance(a * noise, b, kernel=kernel, subsets=7, subset_size=20, seed=5)
        assert shaken == pytest.approx(got, rel=1e-5), kernel


def test_the_adm_protocol_uses_stored_moments_and_the_references_images(monkeypatch, tmp_path, folders):
    """One file with moments of all images and only some images, as the published references are."""
    network = FakeInception("tf1-bilinear")
    monkeypatch.setattr(InceptionV3Compat, "load", lambda weights, resize, device: network)
    real = folders.real_pixels
    features = network(as_tensor(real))
    generated = network(as_tensor(folders.generated_pixels))
    path = tmp_path / "VIRTUAL.npz"
    np.savez(
        path,
        arr_0=real[:6],
        mu=features["pool"].numpy().mean(0),
        sigma=np.cov(features["pool"].numpy(), rowvar=False),
        mu_s=features["spatial"].numpy().mean(0),
        sigma_s=np.cov(features["spatial"].numpy(), rowvar=False),
    )
    result = evaluate(folders.generated, path, protocol="adm", batch_size=24)
    scores = result["scores"]
    assert set(scores) == {"fid", "sfid", "is", "is_shuffled", "precision", "recall", "f_score"}
    for name, feature in (("fid", "pool"), ("sfid", "spatial")):
        expected = nuclear_norm_distance(generated[feature].double(), features[feature].double())
        assert scores[name] == pytest.approx(expected, rel=1e-5)  # the stored mean is float32, as in ADM's files
    assert (scores["precision"], scores["recall"]) == m.precision_recall(generated["pool"], features["pool"][:6])
    assert scores["is"] == pytest.approx(m.inception_score(generated["logits"], [slice(None)]).mean, rel=1e-6)
    assert result["reference"]["moments"] == "stored"
    assert result["reference"]["count"] == 6
    assert result["settings"]["is"] == {"split_size": 5000, "order": "file", "shuffle_seed": 2020}
    assert result["settings"]["prc"]["distance"] == "squared_euclidean_float16"


class BrightnessClassifier:
    """Replaces Inception where only logits matter: predicts one of four classes with certainty, by brightness."""

    name = "inception-v3-compat"
    resize = "tf1-bilinear"
    weights_sha256 = None

    def __call__(self, images):
        classes = images.float().mean((1, 2, 3)).div(64).long()
        return {"pool": colour_statistics(images), "logits": 50.0 * torch.eye(4)[classes]}


def test_adm_inception_score_of_images_sorted_by_class_is_pointed_out(monkeypatch):
    monkeypatch.setattr("vistok.eval.scoring.ADM_SPLIT_SIZE", 10)
    monkeypatch.setattr(InceptionV3Compat, "load", lambda weights, resize, device: BrightnessClassifier())
    levels = torch.tensor([30, 90, 160, 220], dtype=torch.uint8).repeat_interleave(10)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    by_class = evaluate(images, images, protocol="adm", metrics=["is"])
    assert by_class["scores"]["is"] == pytest.approx(1)
    assert by_class["scores"]["is_shuffled"] > 3
    assert any("sorted by class" in warning and "62 instead of 298" in warning for warning in by_class["warnings"])
    shuffled = images[torch.arange(40).view(4, 10).T.flatten()]  # every class in every chunk
    assert evaluate(shuffled, shuffled, protocol="adm", metrics=["is"])["scores"]["is"] > 3


def test_moments_without_images_give_the_frechet_distance_only(tmp_path, folders):
    network = CallableNetwork(colour_statistics, "colours")
    reference = make_reference(folders.real, tmp_path / "reference.npz", network)
    mean, covariance = reference.gaussians["pool"]
    np.savez(tmp_path / "moments.npz", mu=mean.numpy(), sigma=covariance.numpy())
    options = {"features": colour_statistics, "network": "colours"}
    stored = evaluate(folders.generated, tmp_path / "moments.npz", **options)
    computed = evaluate(folders.generated, folders.real, **options)
    assert set(stored["scores"]) == {"frechet_distance"}
    assert stored["scores"]["frechet_distance"] == pytest.approx(computed["scores"]["frechet_distance"], rel=1e-12)
    assert any("no kid" in warning for warning in stored["warnings"])
    with pytest.raises(ValueError, match=r"prc cannot be computed: .* holds moments but no images"):
        evaluate(folders.generated, tmp_path / "moments.npz", metrics=["prc"], **options)


def test_scores_of_another_network_are_never_called_fid(folders):
    result = evaluate(folders.generated, folders.real, features=colour_statistics, network="colours")
    assert set(result["scores"]) == {
        "frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall", "f_score"
    }  # fmt: skip
    assert result["protocol"] == "custom-network"
    assert result["network"]["name"] == "colours"
    expected = m.frechet_distance(
        m.Moments.of(colour_statistics(as_tensor(folders.generated_pixels))).gaussian,
        m.Moments.of(colour_statistics(as_tensor(folders.real_pixels))).gaussian,
    )
    assert result["scores"]["frechet_distance"] == pytest.approx(expected, rel=1e-5)


def test_what_makes_a_score_incomparable_is_pointed_out_with_its_known_effect(tmp_path, folders):
    pixels = smooth_images(4, seed=0, size=16)
    pixels[3] = pixels[0]
    source = write_folder(tmp_path / "lossy", pixels, extension="jpg")
    text = "\n".join(evaluate(source, folders.real, features=colour_statistics, network="colours")["warnings"])
    for expected in (
        r"only 4 images: .* upward by a term of order 1/N",
        r"4 images for 6 pool features: .* mostly bias",
        r"1 of 4 images are exact copies .* 4\.24",
        r"4 lossily compressed .* 2\.2 instead of 1\.5",
        r"images are 16x16, reference images 24x24 .* 2\.11 instead of 2\.19",
    ):
        assert re.search(expected, text), expected


def test_the_size_of_reference_images_is_known_where_only_their_moments_are_used(tmp_path, folders):
    mean, covariance = m.Moments.of(colour_statistics(as_tensor(folders.real_pixels))).gaussian
    np.savez(tmp_path / "adm.npz", arr_0=folders.real_pixels, mu=mean, sigma=covariance)
    images = as_tensor(smooth_images(8, seed=0, size=16))
    options = {"features": colour_statistics, "network": "colours", "metrics": ["fid"]}
    warnings = evaluate(images, tmp_path / "adm.npz", **options)["warnings"]
    assert any("images are 16x16, reference images 24x24" in warning for warning in warnings)


def test_references_of_another_network_are_refused(tmp_path, folders, weights):
    network = CallableNetwork(colour_statistics, "colours", "a" * 64)
    narrow = make_reference(folders.real, tmp_path / "narrow.npz", network)
    with pytest.raises(InvalidReferenceError, match="network 'colours', but the images are scored with 'inception"):
        evaluate(folders.generated, narrow, weights=weights)
    other = CallableNetwork(colour_statistics, "colours", "b" * 64)
    with pytest.raises(InvalidReferenceError, match=r"weights aaaaaaaaaaaa.* scored with weights bbbbbbbbbbbb"):
        narrow.check_network(other, other(as_tensor(folders.real_pixels)))
    # A file of unknown origin: only the width of its features can reveal the mismatch.
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(1024), sigma=np.eye(1024))
    with pytest.raises(InvalidReferenceError, match="1024 features, but inception-v3-compat gives 2048"):
        evaluate(folders.generated, tmp_path / "foreign.npz", weights=weights)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, "holds neither images .* it holds: mean"),
        ({"mu": np.zeros(3)}, "has 'mu' but no 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got \(3,\) and \(4, 4\)"),
    ],
)
def test_incomplete_reference_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(InvalidReferenceError, match=message):
        open_reference(tmp_path / "reference.npz")


def test_a_damaged_reference_file_is_refused(tmp_path):
    (tmp_path / "reference.npz").write_bytes(b"PK nonsense")
    with pytest.raises(InvalidReferenceError, match="not a readable"):
        open_reference(tmp_path / "reference.npz")


def test_questions_that_no_protocol_answers_are_refused(folders):
    generated, real = folders.generated, folders.real
    with pytest.raises(ValueError, match="unknown protocol 'tf'; known: adm, torch-fidelity"):
        evaluate(generated, real, protocol="tf")
    with pytest.raises(ValueError, match="unknown metric 'fiid'; known: fid, sfid"):
        evaluate(generated, real, metrics=["fiid"])
    with pytest.raises(ValueError, match="'torch-fidelity' does not define 'sfid'"):
        evaluate(generated, real, metrics=["sfid"])
    with pytest.raises(ValueError, match="features and network belong together"):
        evaluate(generated, real, features=colour_statistics)
    with pytest.raises(ValueError, match="give your own network another"):
        evaluate(generated, real, features=colour_statistics, network="inception-v3-compat")
    with pytest.raises(ValueError, match="'adm' fixes its network"):
        evaluate(generated, real, features=colour_statistics, network="colours", protocol="adm")
    with pytest.raises(ValueError, match="the function brings its own"):
        evaluate(generated, real, features=colour_statistics, network="colours", weights="inception.pth")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(generated, real, batch_size=0)
    few = as_tensor(smooth_images(3, seed=0))
    with pytest.raises(ValueError, match=r"prc cannot be computed: it needs at least 4 images, and tensor has 3"):
        evaluate(generated, few, metrics=["prc"], features=colour_statistics, network="colours")
    assert set(PROTOCOLS) == {"adm", "torch-fidelity", "clean-fid", "dinov2", "reconstruction"}


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def test_weights_out_of_reach_name_the_option(monkeypatch, tmp_path, folders):
    def unreachable(*args, **kwargs):
        raise networks.urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match=r"no route to host.*weights=PATH \(command line: --weights PATH\)"):
        evaluate(folders.generated, folders.real)


def test_weights_of_another_network_or_absent_ones_are_refused(tmp_path, folders):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not weights of inception-v3-compat"):
        evaluate(folders.generated, folders.real, weights=tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no weights file .*absent\.pth"):
        evaluate(folders.generated, folders.real, weights=tmp_path / "absent.pth")


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_files_are_never_unpickled_blindly(tmp_path):
    torch.save({"fc.weight": Payload(tmp_path / "touched")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        InceptionV3Compat.load(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_feature_functions_that_return_nonsense_are_refused(folders):
    def wrong_shape(images):
        return images.float().mean()

    def not_finite(images):
        return colour_statistics(images) / 0

    with pytest.raises(ValueError, match=r"'wrong' must return \(1, D\) features, got \(\)"):
        evaluate(folders.generated, folders.real, features=wrong_shape, network="wrong")
    with pytest.raises(ValueError, match="broken gives pool features that are not finite"):
        evaluate(folders.generated, folders.real, features=not_finite, network="broken")


def test_full_precision_restores_what_was_set():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    seen = []

    def fails():
        with networks.full_precision():
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert seen == [(False, False)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6))
@settings(max_examples=20)
def test_rows_are_joined_in_their_order(counts):
    store, whole = RowStore(), torch.arange(sum(counts)).unsqueeze(1)
    for part in whole.split(counts):
        store.append(part)
    assert torch.equal(store.join(), whole)
