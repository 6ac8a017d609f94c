"""Evaluation: shards, crops, stored references, resizes, DINOv2, reconstructions as sets, and several processes."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.eval_data import FakeInception, as_tensor, batch_statistics, colour_statistics, smooth_images, write_folder
from support.eval_worker import measure, write_clips
from support.tiny_models import tiny

import vistok
from vistok.checkpoints import CheckpointError
from vistok.data.config import DataConfig
from vistok.data.transforms import center_crop_adm
from vistok.eval import evaluate, evaluate_reconstruction, make_reference
from vistok.eval import metrics as m
from vistok.eval.batches import NETWORK_BATCH
from vistok.eval.dinov2 import DINOv2, resize_positions
from vistok.eval.images import ImageError, open_images
from vistok.eval.networks import CallableNetwork, InceptionV3Compat
from vistok.eval.perturbation import Grid, evaluate_perturbation
from vistok.eval.references import InvalidReferenceError, open_reference
from vistok.eval.resize import resize
from vistok.quantizers.perturbation import perturb, perturbation_draws

torch.set_num_threads(1)
COLOURS = {"features": colour_statistics, "network": "colours"}


@pytest.fixture(scope="module")
def generated() -> np.ndarray:
    return smooth_images(12, seed=1)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return smooth_images(10, seed=2, contrast=60, brightness=150)


@pytest.fixture
def inception(monkeypatch) -> list[FakeInception]:
    """Replaces every Inception that is loaded by a fake."""
    loaded = []

    def load(weights=None, *, resize, device):
        loaded.append(FakeInception(resize))
        return loaded[-1]

    monkeypatch.setattr(InceptionV3Compat, "load", load)
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# Shards and crops


def write_shards(folder: Path, images: np.ndarray, order: list[int], shards: int = 2, extension: str = "png") -> Path:
    """Webdataset shards that hold the images in ``order``, with labels beside them."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for index in order[shard::shards]:
                buffer = io.BytesIO()
                Image.fromarray(images[index]).save(buffer, format="PNG")
                for name, data in ((f"{index:04d}.{extension}", buffer.getvalue()), (f"{index:04d}.cls", b"3")):
                    info = tarfile.TarInfo(f"./{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def test_folder_npz_and_shards_of_the_same_images_have_one_fingerprint_and_one_score(tmp_path, generated, real):
    np.savez(tmp_path / "images.npz", generated)
    sources = (
        write_folder(tmp_path / "images", generated),
        tmp_path / "images.npz",
        write_shards(tmp_path / "shards", generated, [7, 3, 11, 0, 5, 9, 1, 2, 10, 4, 8, 6]),
    )
    options = {"features": batch_statistics, "network": "colours"}
    results = [
        evaluate(source, as_tensor(real), batch_size=size, **options) for source, size in zip(sources, (5, 7, 32))
    ]
    assert len({result["images"]["fingerprint"] for result in results}) == 1
    assert results[1]["scores"] == results[2]["scores"] == results[0]["scores"]  # to the last bit


@pytest.mark.parametrize("kind", ["folder", "npz", "packed", "shards", "tensor"])
def test_any_range_of_a_set_can_be_read(tmp_path, generated, kind):
    sources = {
        "folder": lambda: write_folder(tmp_path / "images", generated),
        "npz": lambda: np.savez(tmp_path / "plain.npz", generated) or tmp_path / "plain.npz",
        "packed": lambda: np.savez_compressed(tmp_path / "packed.npz", generated) or tmp_path / "packed.npz",
        "shards": lambda: write_shards(tmp_path / "shards", generated, list(range(12))),
        "tensor": lambda: as_tensor(generated),
    }
    images = open_images(sources[kind]())
    batches = list(images.batches(3, 2, 9))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), as_tensor(generated)[2:9])
    assert list(images.batches(3, 5, 5)) == []


def test_bad_shards_are_refused_with_the_reason(tmp_path, generated):
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(ImageError, match=r"text\.tar is not a readable \.tar shard"):
        open_images(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(ImageError, match="compressed ones are not supported"):
        open_images(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ImageError, match=r"no images in .*empty"):
        open_images(tmp_path / "empty.tar")
    shards = write_shards(tmp_path / "shards", generated, [0, 1, 2, 3])
    with pytest.raises(ImageError, match="the key '0000' has two images"):
        open_images([shards / "shard-0.tar", shards / "shard-0.tar"])
    whole = (shards / "shard-0.tar").read_bytes()
    with tarfile.open(shards / "shard-0.tar") as archive:
        second = archive.getmembers()[2].offset
    for damaged in (whole[:second] + bytes(512) + whole[second + 512 :], whole[:second]):
        (tmp_path / "damaged.tar").write_bytes(damaged)
        with pytest.raises(ImageError, match=r"damaged\.tar is not a readable \.tar shard.*(damaged|missing)"):
            open_images(tmp_path / "damaged.tar")
    broken = bytearray(whole)
    broken[700:900] = bytes(200)
    (tmp_path / "broken.tar").write_bytes(broken)
    with pytest.raises(ImageError, match=r"cannot read the image .*broken\.tar:0000\.png"):
        list(open_images(tmp_path / "broken.tar").batches(2))


def test_a_reference_is_cropped_as_papers_do(tmp_path, generated):
    folder = write_folder(tmp_path / "photos", smooth_images(3, seed=5, size=60))
    Image.fromarray(smooth_images(1, seed=6, size=80)[0, :50]).save(folder / "wide.png")
    with pytest.raises(ImageError, match=r"mixed sizes.*--crop SIZE"):
        open_images(folder)
    cropped = open_images(folder, crop=24)
    assert cropped.size == (24, 24)
    with Image.open(folder / "wide.png") as image:
        expected = np.asarray(center_crop_adm(image, 24))
    assert np.array_equal(next(cropped.batches(4))[3].permute(1, 2, 0), expected)
    result = evaluate(as_tensor(generated), folder, crop=24, **COLOURS)
    assert (result["reference"]["size"], result["settings"]["crop"]) == ([24, 24], 24)
    with pytest.raises(ImageError, match="24x24; crop=32 applies to image files"):
        open_images(as_tensor(generated), crop=32)


# ---------------------------------------------------------------------------------------------------------------------
# Stored sides


def test_a_reference_file_gives_the_scores_of_its_images(tmp_path, generated, real):
    network = CallableNetwork(colour_statistics, "colours")
    made = make_reference(as_tensor(real), tmp_path / "reference.npz", network, split="train")
    stored = evaluate(as_tensor(generated), tmp_path / "reference.npz", **COLOURS)
    computed = evaluate(as_tensor(generated), as_tensor(real), **COLOURS)
    assert stored["scores"] == pytest.approx(computed["scores"], rel=1e-9)
    told = stored["reference"]["stored"]
    assert told["fingerprint"] == computed["reference"]["fingerprint"]
    assert (told["count"], told["split"], told["image_size"], told["network"]) == (10, "train", "24x24", "colours")
    assert told["moments_sha256"] == made.moments_sha256


def test_a_reference_file_keeps_features_of_some_images_evenly_spread(tmp_path, monkeypatch, real):
    monkeypatch.setattr("vistok.eval.references.KEPT_ROWS", 4)
    network = CallableNetwork(colour_statistics, "colours")
    made = make_reference(as_tensor(real), tmp_path / "reference.npz", network)
    assert torch.equal(made.rows, colour_statistics(as_tensor(real))[[0, 2, 5, 7]])
    assert made.provenance.count == 10


def test_stored_moments_stand_for_images_on_either_side(tmp_path, generated, real):
    for name, images in (("generated", generated), ("real", real)):
        mean, covariance = m.Moments.of(colour_statistics(as_tensor(images))).gaussian
        np.savez(tmp_path / f"{name}.npz", mu=mean.numpy(), sigma=covariance.numpy())
    live = evaluate(as_tensor(generated), as_tensor(real), metrics=["fid"], **COLOURS)["scores"]["frechet_distance"]
    mixed = evaluate(tmp_path / "generated.npz", as_tensor(real), **COLOURS)
    assert mixed["scores"] == {"frechet_distance": pytest.approx(live, rel=1e-9)}
    assert any("no prc: the images" in warning for warning in mixed["warnings"])
    # Both sides stored: no network is needed, and so no weights.
    both = evaluate(tmp_path / "generated.npz", tmp_path / "real.npz", protocol="adm", weights="nowhere.pth")
    assert both["scores"] == {"fid": pytest.approx(live, rel=1e-9)}
    assert both["images"]["count"] is None


def test_a_reference_made_otherwise_is_refused(tmp_path, inception, generated, real):
    make_reference(as_tensor(real), tmp_path / "clean.npz", FakeInception("pil-bicubic-float"))
    with pytest.raises(InvalidReferenceError, match="resize rule 'pil-bicubic-float', but this protocol's is 'tf1"):
        evaluate(as_tensor(generated), tmp_path / "clean.npz", protocol="adm")
    clean = evaluate(as_tensor(generated), tmp_path / "clean.npz", protocol="clean-fid")
    assert set(clean["scores"]) == {"clean_fid", "clean_kid", "clean_kid_std"}
    assert clean["network"]["resize"] == "pil-bicubic-float"
    with np.load(tmp_path / "clean.npz") as file:
        arrays = dict(file)
    arrays["mu"] = arrays["mu"] + 1
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(InvalidReferenceError, match=r"changed\.npz was changed after it was made"):
        open_reference(tmp_path / "changed.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(InvalidReferenceError, match="values that are not finite"):
        open_reference(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, val, test"):
        make_reference(as_tensor(real), tmp_path / "x.npz", FakeInception("tf1-bilinear"), split="valid")


def test_rfid_against_training_statistics_is_refused_with_the_reason(tmp_path, inception, generated, real):
    network = FakeInception("tf1-bilinear")
    make_reference(as_tensor(real), tmp_path / "train.npz", network, split="train")
    with pytest.raises(InvalidReferenceError, match=r"statistics of training images.* 4\.28 .* instead of 2\.19"):
        evaluate(as_tensor(generated), tmp_path / "train.npz", protocol="reconstruction")
    gaussian = open_reference(tmp_path / "train.npz").gaussians["pool"]
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=real, mu=gaussian.mean, sigma=gaussian.covariance)
    with pytest.raises(InvalidReferenceError, match=r"unknown origin \(ADM's are of training\).*--split val"):
        evaluate(as_tensor(generated), tmp_path / "VIRTUAL.npz", protocol="reconstruction")

    make_reference(as_tensor(real), tmp_path / "val.npz", network, split="val")
    result = evaluate(as_tensor(generated), tmp_path / "val.npz", protocol="reconstruction")
    assert set(result["scores"]) == {"rfid"}
    assert any("no PSNR" in warning for warning in result["warnings"])
    # And the other way round: generated images against held-out ones.
    warnings = evaluate(as_tensor(generated), tmp_path / "val.npz", protocol="adm")["warnings"]
    assert any("the reference is of the split 'val'" in warning and "4.28" in warning for warning in warnings)


def test_images_that_are_their_own_reference_are_pointed_out(real):
    warnings = evaluate(as_tensor(real), as_tensor(real), **COLOURS)["warnings"]
    assert any("the images and the reference are the same" in warning for warning in warnings)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions as sets


def test_the_reconstruction_protocol_scores_pairs_and_sets_in_one_pass(tmp_path, inception, real):
    restored = np.clip(0.8 * real.astype(int) + 5, 0, 255).astype(np.uint8)
    originals, reconstructions = write_folder(tmp_path / "a", real), write_folder(tmp_path / "b", restored)
    result = evaluate(reconstructions, originals, protocol="reconstruction", batch_size=4, out=tmp_path / "out")
    pairs = evaluate_reconstruction(originals, reconstructions)
    expected = m.frechet_distance(
        *(m.Moments.of(colour_statistics(as_tensor(images))).gaussian for images in (restored, real))
    )
    assert result["scores"] == {"rfid": pytest.approx(expected, rel=1e-6)} | pairs["scores"]
    assert inception[0].calls == 2  # exactly one batch of each side, for any batch size
    assert result["network"]["name"] == "inception-v3-compat"
    assert result["images"]["source"] == str(reconstructions)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result


def test_the_reconstruction_protocol_records_crop_and_reading_and_honours_metrics(tmp_path, inception):
    large, restored = smooth_images(4, seed=5, size=32), smooth_images(4, seed=6)
    originals = write_folder(tmp_path / "a", large)
    options = {"protocol": "reconstruction", "crop": 24, "batch_size": 3, "device": "cpu"}
    result = evaluate(as_tensor(restored), originals, **options)
    told = {name: result["settings"][name] for name in ("crop", "batch_size", "device", "processes")}
    assert told == {"crop": 24, "batch_size": 3, "device": "cpu", "processes": 1}
    only = evaluate(as_tensor(restored), originals, metrics=["fid"], **options)
    assert only["scores"] == {"rfid": pytest.approx(result["scores"]["rfid"], rel=1e-9)}
    assert not any("no PSNR" in note for note in only["warnings"])


def test_lpips_where_no_pairs_are_scored_is_refused(generated, real):
    def lpips(a, b):
        return (a - b).abs().flatten(1).mean(1)

    for options in ({}, {"protocol": "adm"}, {"protocol": "reconstruction", "metrics": ["fid"]}):
        with pytest.raises(ValueError, match="leave lpips out"):
            evaluate(as_tensor(generated), as_tensor(real), lpips=lpips, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> DataConfig:
    root = write_folder(tmp_path_factory.mktemp("photos") / "images", smooth_images(7, seed=4, size=16))
    return DataConfig(image_size=16, root=str(root), split=None, batch_size=3)


def counted(monkeypatch, model, method: str) -> list[int]:
    """Lengths of the batches that a method of ``model`` will be called with."""
    lengths, inner = [], getattr(model, method)

    def call(batch, *args, **options):
        lengths.append(len(batch))
        return inner(batch, *args, **options)

    monkeypatch.setattr(model, method, call)
    return lengths


def test_a_tokenizers_rfid_is_that_of_its_reconstructions(monkeypatch, photos):
    from vistok.eval.tokenizers import DataImages, Reconstructions, evaluate_tokenizer

    tokenizer, network = tiny("vit_vqgan"), CallableNetwork(colour_statistics, "colours")
    batches = counted(monkeypatch, tokenizer, "reconstruct")
    result = evaluate_tokenizer(tokenizer, photos, network=network)
    assert batches == [NETWORK_BATCH]  # of 7 images, 3 at a time
    originals = DataImages(photos)
    sets = [torch.cat(list(images.batches(7))) for images in (Reconstructions(tokenizer, originals), originals)]
    expected = m.frechet_distance(*(m.Moments.of(colour_statistics(images)).gaussian for images in sets))
    assert result["scores"]["frechet_distance"] == pytest.approx(expected, rel=1e-6)


def test_perturbed_tokens_are_near_codes_drawn_evenly():
    neighbours = torch.arange(8).expand(4, 4000, 8)
    from vistok.draws import Keys

    draws = perturbation_draws(Keys.range(0, 4), 4000)
    ranks = perturb(neighbours, 0.5, 4, draws)
    assert torch.equal(perturb(neighbours, 0.5, 1, draws), neighbours[..., 0])  # the nearest code only
    shares = torch.bincount(ranks.flatten(), minlength=8) / ranks.numel()
    torch.testing.assert_close(shares, torch.tensor([5 / 8, 1 / 8, 1 / 8, 1 / 8, 0, 0, 0, 0]), atol=0.02, rtol=0)
    assert not torch.equal(ranks[0], ranks[1])


def test_pfid_is_the_mean_over_its_grid_and_rfid_its_unperturbed_cell(monkeypatch, photos):
    tokenizer, network = tiny("vit_vqgan"), CallableNetwork(batch_statistics, "colours")
    batches = counted(monkeypatch, tokenizer, "decode")
    result = evaluate_perturbation(tokenizer, photos, network, grid=Grid((0.5, 1.0), (1, 8, 100)))
    cells = {(cell["rate"], cell["strength"]): cell["fid"] for cell in result["cells"]}
    plain = result["scores"]["frechet_distance"]
    assert set(cells) == {(rate, strength) for rate in (0.5, 1.0) for strength in (1, 8, 32)}  # 32 codes there are
    assert cells[0.5, 1] == cells[1.0, 1] == pytest.approx(plain)
    assert cells[1.0, 32] != plain
    assert result["scores"]["perturbed_frechet_distance"] == pytest.approx(np.mean(list(cells.values())))
    assert any("no official code" in warning for warning in result["warnings"])
    assert any("[100] exceed the codebook of 32" in warning for warning in result["warnings"])
    other = evaluate_perturbation(
        tokenizer, DataConfig(**{**vars(photos), "batch_size": 7}), network, grid=Grid((0.5, 1.0), (1, 8, 100))
    )
    assert other["scores"] == result["scores"]  # whatever the batch size
    assert set(batches) == {NETWORK_BATCH}


def test_pfid_refuses_what_it_cannot_perturb(photos):
    with pytest.raises(ValueError, match="continuous latents"):
        evaluate_perturbation(tiny("kl_vae"), photos, CallableNetwork(colour_statistics, "colours"))
    with pytest.raises(ValueError, match=r"rate must lie in \(0, 1\], got 0"):
        Grid(rates=(0,))
    with pytest.raises(ValueError, match="at least 1 code, got 0"):
        Grid(strengths=(0,))


# ---------------------------------------------------------------------------------------------------------------------
# Resizes and DINOv2


@pytest.mark.parametrize("size", [(32, 32), (256, 200), (299, 299), (310, 450)])
def test_matrix_resizes_equal_the_tools_own(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize(images, 299, "tf1-bilinear"), expected, atol=1e-4, rtol=0)

    bicubic = Image.Resampling.BICUBIC
    planes = [Image.fromarray(plane.float().numpy(), mode="F").resize((299, 299), bicubic) for plane in images[0]]
    expected = torch.from_numpy(np.stack(planes)).clamp(0, 255)
    torch.testing.assert_close(resize(images, 299, "pil-bicubic-float")[0], expected, atol=2e-4, rtol=0)
    whole = Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize((224, 224), bicubic)
    assert np.array_equal(resize(images, 224, "pil-bicubic-8bit")[1].permute(1, 2, 0), np.asarray(whole))


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match="unknown resize rule 'area'; known: tf1-bilinear, pil-bicubic-float"):
        resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 8, "area")


@pytest.fixture(scope="module")
def dino_state() -> dict[str, torch.Tensor]:
    """A small DINOv2 with random weights and a position table of 4x4 patches."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=64, depth=2, num_heads=1, init_values=0.1, num_classes=0
    )
    return {**network.state_dict(), "mask_token": torch.zeros(1, 64)}


def test_fd_dinov2_reads_its_sizes_from_the_weights(tmp_path, dino_state, generated, real):
    torch.save(dino_state, tmp_path / "dino.pth")
    result = evaluate(
        as_tensor(generated[:6]), as_tensor(real[:7]), protocol="dinov2", weights=tmp_path / "dino.pth", batch_size=4
    )
    assert set(result["scores"]) == {"fd_dinov2", "precision", "recall", "f_score"}
    assert result["network"]["name"] == "dinov2-vit-64x2-14"
    assert result["network"]["resize"] == "pil-bicubic-8bit"
    assert result["settings"]["prc"]["neighbours"] == 5
    assert result["settings"]["prc"]["boundary"] == "excluded"
    assert any("defined with dinov2-vit-l-14" in warning for warning in result["warnings"])


def test_dinov2_is_the_class_token_of_normalised_images(dino_state, generated):
    from timm.models.vision_transformer import VisionTransformer

    state = {key: tensor for key, tensor in dino_state.items() if key != "mask_token"}
    state["pos_embed"] = resize_positions(state["pos_embed"], 16)
    plain = VisionTransformer(
        img_size=224, patch_size=14, embed_dim=64, depth=2, num_heads=1, init_values=0.1, num_classes=0
    ).eval()
    plain.load_state_dict(state)
    images = as_tensor(generated[:2])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = plain((resize(images, 224, "pil-bicubic-8bit") / 255 - mean) / std)
    torch.testing.assert_close(DINOv2(dino_state)(images)["pool"], expected, atol=1e-5, rtol=1e-5)


def test_positions_are_resized_as_the_hub_does_not_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(table, 16)
    assert torch.equal(resized[:, 0], table[:, 0])
    # Bicubic at (i + 0.5) * 37 / 16.1 - 0.5, from sixteen neighbours: the first output by hand.
    position = 0.5 * 37 / 16.1 - 0.5
    fraction = position - np.floor(position)

    def weight(x: float, a: float = -0.75) -> float:
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    rows = [max(0, int(np.floor(position)) + k) for k in (-1, 0, 1, 2)]
    weights = torch.tensor([weight(fraction - k) for k in (-1, 0, 1, 2)], dtype=torch.float32)
    corner = table[0, 1:].view(37, 37, 8)[rows][:, rows]
    torch.testing.assert_close(resized[0, 1], torch.einsum("i,j,ijd->d", weights, weights, corner), atol=1e-4, rtol=0)
    assert (resized - resample_abs_pos_embed(table, [16, 16])).abs().max() > 0.1
    assert resize_positions(table, 37) is table


def test_dinov2_weights_out_of_reach_or_of_something_else_are_refused(monkeypatch, tmp_path, dino_state, generated):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match=r"no route to host.*dinov2_vitl14_pretrain\.pth.*--weights PATH"):
        evaluate(as_tensor(generated), as_tensor(generated), protocol="dinov2")
    with pytest.raises(CheckpointError, match="not weights of a DINOv2"):
        DINOv2({"fc.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not weights of a DINOv2"):
        DINOv2({**dino_state, "register_tokens": torch.zeros(1, 4, 64)})


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path, generated, real):
    write_folder(tmp_path / "generated", generated)
    write_folder(tmp_path / "real", real)
    write_folder(tmp_path / "restored", np.clip(real.astype(int) + 3, 0, 255).astype(np.uint8))
    write_clips(tmp_path / "clips")
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    tests, workers = Path(__file__).parents[1], []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (tests, Path(vistok.__file__).parents[1]))),
        }  # fmt: skip
        command = [sys.executable, str(tests / "support" / "eval_worker.py"), str(tmp_path)]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    alone = measure(tmp_path, tmp_path / "alone", batch_size=9)
    for rank in range(2):
        shared = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert shared.keys() == alone.keys()
        for name in alone:
            assert shared[name]["scores"] == pytest.approx(alone[name]["scores"], rel=1e-6), name
            assert shared[name]["fingerprint"] == alone[name]["fingerprint"]
