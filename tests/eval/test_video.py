"""Scores of clips: statistics that add up, the settings that protocols fix, and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny_models import tiny
from torch import Tensor
from typer.testing import CliRunner

from vistok.checkpoints import CheckpointError
from vistok.cli import app
from vistok.data import DataConfig
from vistok.eval.clips import (
    choose_clips,
    clip_statistics,
    distance_notes,
    evaluate_clip_tokenizer,
    evaluate_clips,
    load_clip_network,
    open_videos,
    pair_scores,
)
from vistok.eval.fvd import ClipStatistics, StatisticsError, frechet_video_distance
from vistok.eval.i3d import I3DNetwork, InceptionI3D, preprocess, same_padding
from vistok.eval.metrics import Moments
from vistok.eval.video import mean_squared_error, psnr, ssim
from vistok.eval.video_protocols import VIDEO_PROTOCOLS, chunks_of, drawn, video_protocol
from vistok.utils.processes import Processes


class MeanColours:
    """Features that need no network."""

    name, resize, weights_sha256 = "mean-colours", "none", None

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        return {"pool": clips.mean((3, 4)).flatten(1)[:, :6]}


def clips(count: int, seed: int = 0, frames: int = 16, size: int = 128) -> Tensor:
    return torch.rand(count, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def statistics(pixels: Tensor, protocol: str = "larp-ucf-gen", network=None) -> ClipStatistics:
    return ClipStatistics.of(pixels.split(3), network or MeanColours(), video_protocol(protocol), source="test")


@pytest.mark.parametrize("ddof", [0, 1])
def test_covariance_over_n_or_n_minus_1(ddof):
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = Moments.of(rows).fit(ddof)
    torch.testing.assert_close(fitted.covariance, torch.cov(rows.T, correction=ddof))
    with pytest.raises(ValueError, match="ddof must be"):
        Moments.of(rows).fit(2)


def test_statistics_of_parts_add_up_and_survive_a_file(tmp_path):
    pixels = clips(8, size=128)
    whole, first, second = (statistics(part) for part in (pixels, pixels[:3], pixels[3:]))
    first.save(tmp_path / "first.safetensors")
    merged = ClipStatistics.load(tmp_path / "first.safetensors").merge(second)
    assert merged.count == whole.count == 8
    torch.testing.assert_close(merged.moments.outer, whole.moments.outer)
    other = statistics(clips(8, seed=1))
    score, again = frechet_video_distance(whole, other), frechet_video_distance(merged, other)
    assert math.isclose(score["frechet_distance"], again["frechet_distance"], rel_tol=1e-9)
    assert "fvd" not in score  # the network is not I3D
    assert score["protocol"]["ddof"] == 0


def test_statistics_of_other_means_are_refused(tmp_path):
    mine = statistics(clips(4))
    with pytest.raises(StatisticsError, match=r"protocol is 'larp-ucf-gen' .* 'tats'"):
        frechet_video_distance(mine, statistics(clips(4), "tats"))
    with pytest.raises(StatisticsError, match="no clip statistics of ours"):
        ClipStatistics.load(tmp_path / "absent.safetensors")
    with pytest.raises(StatisticsError, match="no clips"):
        ClipStatistics.of([], MeanColours(), video_protocol("tats"), source="nowhere")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 0),
        ("count", 2.5),
        ("sum", torch.full((6,), torch.nan, dtype=torch.float64)),
        ("sum", torch.zeros(6, dtype=torch.int64)),
        ("sum", torch.full((6,), 1e6, dtype=torch.float64)),
        ("outer", -torch.eye(6, dtype=torch.float64)),
        ("outer", torch.ones(6, 6, dtype=torch.float64).triu()),
        ("outer", torch.eye(5, dtype=torch.float64)),
        ("source", None),
        ("protocol", 3),
    ],
)
def test_statistics_that_no_clips_have_are_refused(tmp_path, name, value):
    path = tmp_path / "x.safetensors"
    statistics(clips(4)).save(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["clip_statistics"])
        tensors = {key: file.get_tensor(key) for key in ("sum", "outer")}
    assert len(tensors["sum"]) == 6
    (tensors if name in tensors else told)[name] = value
    save_file(tensors, path, metadata={"clip_statistics": json.dumps(told)})
    with pytest.raises(StatisticsError, match=r"x\.safetensors holds no clip statistics of ours"):
        ClipStatistics.load(path)


@pytest.mark.parametrize("key", ["protocol", "network", "weights_sha256", "source", "count"])
def test_statistics_that_lack_a_fact_are_refused(tmp_path, key):
    path = tmp_path / "x.safetensors"
    statistics(clips(4)).save(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["clip_statistics"])
        tensors = {name: file.get_tensor(name) for name in ("sum", "outer")}
    told.pop(key)
    save_file(tensors, path, metadata={"clip_statistics": json.dumps(told)})
    with pytest.raises(StatisticsError, match=key):
        ClipStatistics.load(path)


def test_protocols_prepare_pixels_as_they_say():
    pixels = clips(1)
    exact = video_protocol("larp-ucf-gen").prepare(pixels)
    torch.testing.assert_close(exact, (pixels + 1) * 127.5)
    truncated = video_protocol("seed-voken-ucf-rec").prepare(pixels)
    assert torch.equal(truncated, exact.floor())
    assert video_protocol("larp-k600-fp").prepare(pixels).shape == (1, 3, 16, 64, 64)
    with pytest.raises(ValueError, match=r"scores clips \(B, C, 16, 128, 128\), got \(1, 16, 3, 128, 128\)"):
        video_protocol("tats").prepare(pixels.transpose(1, 2))
    with pytest.raises(ValueError, match="unknown video protocol 'larp'; known: larp-ucf-gen"):
        video_protocol("larp")
    assert all(name == protocol.name for name, protocol in VIDEO_PROTOCOLS.items())


@given(lengths=st.lists(st.integers(0, 70), max_size=5), frames=st.integers(1, 17), stride=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_chunks_do_not_overlap_and_lie_inside(lengths, frames, stride):
    chunks = chunks_of(lengths, frames, stride)
    assert len(set(chunks)) == len(chunks)
    assert len(chunks) == sum(length // (frames * stride) for length in lengths)
    for video, start in chunks:
        assert start % (frames * stride) == 0
        assert start + (frames - 1) * stride < lengths[video]


def test_drawn_clips_are_those_of_pythons_generator():
    assert drawn(1000, 3, 42) == [654, 114, 25]
    assert drawn(2, 3, 42) == [0, 1]


@pytest.mark.parametrize(("name", "count"), [("tats", 2048), ("videogpt", 256)])
def test_random_clips_are_drawn_by_a_recorded_seed(name, count):
    class ManyVideos:
        def __len__(self):
            return 3000

        def length(self, index):
            return 40

    rules = video_protocol(name)
    chosen = choose_clips(ManyVideos(), rules, real=True, name="many")
    assert len(chosen) == len(set(chosen.starts)) == count
    assert chosen.starts == choose_clips(ManyVideos(), rules, real=True, name="many").starts
    assert rules.describe()["seed"] is not None
    with pytest.raises(ValueError, match="'mine' draws real clips, which needs a seed"):
        replace(rules, name="mine", seed=None)


def test_psnr_of_a_clip_is_not_above_the_mean_of_its_frames():
    a, b = (clips(2, seed=seed, frames=4, size=16) for seed in (0, 1))
    b[:, :, 0] = a[:, :, 0] + 0.01
    assert psnr(a, b, "frame").shape == (2, 4)
    assert bool((psnr(a, b) <= psnr(a, b, "frame").mean(1)).all())
    torch.testing.assert_close(mean_squared_error(a, b, "frame").mean(1), mean_squared_error(a, b))
    assert bool(psnr(a, a).isinf().all())
    torch.testing.assert_close(ssim(a, a), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("score", [psnr, ssim])
def test_swapped_axes_are_named(score):
    swapped = torch.zeros(1, 8, 3, 16, 16)
    with pytest.raises(ValueError, match="are C and T swapped"):
        score(swapped, swapped)
    with pytest.raises(ValueError, match="one shape"):
        score(swapped, swapped[:, :4])


@given(size=st.integers(1, 20), kernel=st.integers(1, 7), stride=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_same_padding_gives_ceil_of_size_over_stride(size, kernel, stride):
    padded = same_padding(torch.ones(1, 1, size, size, size), (kernel,) * 3, (stride,) * 3)
    assert (padded.shape[2] - kernel) // stride + 1 == -(-size // stride)


def test_i3d_with_random_weights_says_so_and_reads_grey_clips():
    network = I3DNetwork(None)
    assert "random" in network.name
    grey = torch.randint(0, 256, (1, 1, 9, 12, 20), dtype=torch.uint8)
    features = network(grey)["pool"]
    assert features.shape == (1, 400)
    torch.testing.assert_close(features, network(grey.expand(-1, 3, -1, -1, -1))["pool"])
    side = statistics(clips(2), network=network)
    assert "fvd" not in frechet_video_distance(side, side)
    notes = distance_notes(video_protocol("larp-ucf-gen"), side, side, {})
    assert any("defined with i3d-kinetics400 or i3d-torchscript" in note and network.name in note for note in notes)
    assert sum("2 generated clips" not in note and "2 clips for 400 pool features" in note for note in notes) == 2


def test_bad_clips_and_weights_of_i3d_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        InceptionI3D().eval()(torch.zeros(1, 3, 8, 224, 224))
    with pytest.raises(ValueError, match="are C and T swapped"):
        preprocess(torch.zeros(1, 16, 3, 8, 8))
    with pytest.raises(CheckpointError, match="another one"):
        I3DNetwork({"Conv3d_1a_7x7.conv3d.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no weights file"):
        I3DNetwork.load(tmp_path / "absent.pt")


def test_torchscript_runs_by_choice_only(tmp_path):
    class Detector(torch.nn.Module):
        def forward(self, x, rescale: bool, resize: bool, return_features: bool):
            return x.flatten(1)[:, :400]

    torch.jit.script(Detector()).save(file := tmp_path / "weights.pt")  # the name tells nothing
    with pytest.raises(CheckpointError, match=r"is TorchScript, which runs the code .* --torchscript"):
        load_clip_network(file)
    network = load_clip_network(file, torchscript=True)
    assert network(torch.zeros(2, 3, 9, 8, 8))["pool"].shape == (2, 400)
    torch.save(InceptionI3D().state_dict(), port := tmp_path / "i3d_torchscript.pt")
    assert load_clip_network(port).name == "i3d-kinetics400"
    with pytest.raises(ValueError, match="name the TorchScript file"):
        load_clip_network(None, torchscript=True)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of clips


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Real videos of 40, 20 and 4 frames and a damaged one; two generated ones."""
    pytest.importorskip("av", reason="a file of a video is among them")
    root = tmp_path_factory.mktemp("clips")
    for name, length, seed in (
        ("real/a", 40, 0),
        ("real/b", 20, 1),
        ("real/short", 4, 2),
        ("made/a", 16, 3),
        ("made/b", 16, 4),
    ):
        frames = np.random.default_rng(seed).integers(0, 256, (length, 24, 32, 3), dtype=np.uint8)
        (root / name).mkdir(parents=True)
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(root / name / f"{number:03d}.png")
    (root / "real" / "damaged.mp4").write_bytes(b"no video")
    return {name: root / name for name in ("real", "made")}


def test_folders_of_clips_are_scored_by_their_protocol(folders):
    result = evaluate_clips(folders["made"], folders["real"], protocol="larp-ucf-gen", network=MeanColours())
    assert result["images"]["count"] == 2
    assert {"vistok", "torch"} <= result["versions"].keys()
    assert result["reference"]["count"] == 3  # chunks: two of the first, one of the second video
    assert {Path(name).name for name in result["left_out"]} == {"short", "damaged.mp4"}
    assert any("10,000 generated clips; these are 2" in note for note in result["warnings"])
    starts = choose_clips(open_videos(folders["real"]), video_protocol("larp-ucf-rec"), real=True, name="real")
    assert len(starts) == 3  # one clip of each readable video; the short one is padded by repetition
    assert next(starts.batches(8, 0, 3)).shape == (3, 3, 16, 128, 128)


def test_statistics_of_a_side_can_be_stored_and_shares_of_processes_add_up(folders, tmp_path):
    rules = video_protocol("stylegan-v")

    class First(Processes):
        def gather(self, value):
            raise Share(value)

    class Share(Exception):
        pass

    parts = []
    for index in range(2):
        try:
            clip_statistics(folders["real"], rules, MeanColours(), real=True, processes=First(index, 2))
        except Share as share:
            parts.append(share.args[0])
    whole, _ = clip_statistics(folders["real"], rules, MeanColours(), real=True)
    assert [part.count for part in parts] == [1, 2]
    torch.testing.assert_close(parts[0].merge(parts[1]).moments.outer, whole.moments.outer)
    whole.save(tmp_path / "real.safetensors")
    stored = evaluate_clips(
        folders["made"], tmp_path / "real.safetensors", protocol="stylegan-v", network=MeanColours()
    )
    direct = evaluate_clips(folders["made"], folders["real"], protocol="stylegan-v", network=MeanColours())
    assert stored["scores"] == direct["scores"]


def test_folders_without_usable_clips_are_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no videos in"):
        evaluate_clips(tmp_path / "empty", folders["real"], protocol="tats", network=MeanColours())
    short = tmp_path / "short" / "one"
    short.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(short / "0.png")
    with pytest.raises(ValueError, match=r"no video of .* has the 16 frames"):
        evaluate_clips(tmp_path / "short", folders["real"], protocol="larp-ucf-gen", network=MeanColours())


def test_command_line_scores_clips(folders, tmp_path):
    torch.manual_seed(0)
    torch.save(InceptionI3D().state_dict(), tmp_path / "i3d.pt")
    out = tmp_path / "result.json"
    arguments = ["eval", str(folders["made"]), "--reference", str(folders["made"]), "--protocol", "larp-ucf-gen"]
    run = CliRunner().invoke(app, [*arguments, "--weights", str(tmp_path / "i3d.pt"), "--out", str(out)])
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    assert abs(result["scores"]["fvd"]) < 1e-3
    assert result["video_protocol"]["num_frames"] == 16
    assert result["network"]["weights_sha256"]


def test_pairs_are_scored_per_clip_and_per_frame():
    a, b = clips(2, frames=4, size=16), clips(2, seed=1, frames=4, size=16)
    scores = pair_scores(a, b, lambda x, y: (x - y).abs().mean((1, 2, 3)))
    assert set(scores) == {"psnr", "psnr_frames", "ssim_frames", "lpips_frames"}
    assert all(values.shape == (2,) for values in scores.values())
    assert bool((scores["psnr"] <= scores["psnr_frames"]).all())
    assert "ssim_frames" not in pair_scores(a[..., :8, :8], b[..., :8, :8])  # smaller than the window
    torch.testing.assert_close(pair_scores(a, 3 * b)["psnr"], pair_scores(a, (3 * b).clamp(-1, 1))["psnr"])


def test_a_tokenizer_of_clips_is_scored_alike_by_one_process_and_by_two():
    model = tiny("larp", num_frames=16, image_size=16, temporal_patch_size=4, in_channels=1)
    data = DataConfig(16, source="moving_digits", num_frames=16, channels=1, batch_size=3, limit=7, split="test")
    result = evaluate_clip_tokenizer(model, data)
    assert set(result["scores"]) == {"psnr", "psnr_frames", "ssim_frames"}
    assert result["images"]["count"] == 7

    class Share(Exception):
        pass

    class Part(Processes):
        def gather(self, value):
            raise Share(value)

    parts = []
    for index in range(2):
        with pytest.raises(Share) as share:
            evaluate_clip_tokenizer(model, data, processes=Part(index, 2))
        parts.append(share.value.args[0])
    total = sum(sums["psnr"] for sums, _, _ in parts) / sum(count for _, count, _ in parts)
    assert math.isclose(total, result["scores"]["psnr"], rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"scores clips \(B, C, 16, 128, 128\), got \(3, 1, 16, 16, 16\)"):
        evaluate_clip_tokenizer(model, data, network=MeanColours())


def test_the_distance_of_reconstructions_is_rfvd():
    model = tiny("larp", num_frames=16, image_size=128, temporal_patch_size=4, patch_size=32, in_channels=1)
    data = DataConfig(128, source="moving_digits", num_frames=16, channels=1, batch_size=2, limit=4)
    result = evaluate_clip_tokenizer(model, data, network=MeanColours())
    assert result["scores"]["frechet_distance"] > 0
    assert result["video_protocol"]["name"] == "larp-ucf-rec"


def test_a_score_of_zero_is_a_score(monkeypatch):
    model = tiny("larp", num_frames=16, image_size=16, temporal_patch_size=4, in_channels=1)
    monkeypatch.setattr(model, "reconstruct", lambda pixels: pixels)
    data = DataConfig(16, source="moving_digits", num_frames=16, channels=1, batch_size=3, limit=4, split="test")
    result = evaluate_clip_tokenizer(model, data, lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert result["scores"]["lpips_frames"] == 0
    assert result["scores"]["psnr"] == 100
