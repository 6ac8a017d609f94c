"""The benchmark of clips: same numbers in one run, after an interruption and when continued; refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.tiny_models import tiny
from torch import Tensor

from vistok.cli import main
from vistok.data.movies import save_mp4
from vistok.eval.clip_benchmark import benchmark_clips
from vistok.eval.clips import choose_clips, evaluate_clips, open_videos, statistics_of
from vistok.eval.video_protocols import is_video_protocol, video_protocol
from vistok.pipelines import Pipeline
from vistok.utils.outputs import ResumeError

pytest.importorskip("av")

PROTOCOL = "own-4x16"


class Colours:
    """Features of a few numbers: brightness by frame, and its spread."""

    name, resize, weights_sha256 = "colours", "none", None

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.cat([clips.mean((1, 3, 4)), clips.std((1, 3, 4))], 1)}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("larp", image_size=16)


@pytest.fixture(scope="module")
def pipe(tokenizer) -> Pipeline:
    return Pipeline(tokenizer, tiny("llama", spec=tokenizer.spec, num_classes=2, positions="learned"))


@pytest.fixture(scope="module")
def predictor(tokenizer) -> Pipeline:
    length = tokenizer.num_tokens
    model = tiny("llama", spec=tokenizer.spec, condition_tokens=length, positions="learned", num_positions=2 * length)
    return Pipeline(tokenizer, model)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    generator = np.random.default_rng(0)
    for number in range(10):
        (root / f"action{number % 2}").mkdir(exist_ok=True)
        clip = generator.integers(0, 256, (9, 1, 1, 3), dtype=np.uint8).repeat(16, 1).repeat(24, 2)
        save_mp4(clip, root / f"action{number % 2}" / f"{number}.mp4")
    return root


@pytest.fixture(scope="module")
def finished(pipe, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "out"
    return out, run(pipe, out, videos, command="vistok benchmark runs/x")


def run(pipe, out, videos, **options):
    settings = {"reference": videos, "protocol": PROTOCOL, "network": Colours(), "guidance_scales": [1.0, 1.5]}
    return benchmark_clips(pipe, out, **(settings | options))


def test_clips_follow_the_classes_of_the_real_ones_and_are_scored(pipe, videos, finished):
    out, result = finished
    assert result["benchmark"]["labels"] == "classes of the real clips"
    assert result["benchmark"]["num_images"] == 20  # two chunks of four frames of each video
    assert [scored["guidance_scale"] for scored in result["runs"]] == [1.0, 1.5]
    labels = [0] * 10 + [1] * 10
    pixels = pipe(labels, seed=0, guidance_scale=1.5).pixels
    rules = video_protocol(PROTOCOL)
    real = choose_clips(open_videos(videos), rules, real=True, name="real")
    theirs = statistics_of(real, rules, Colours())
    features = Colours()(rules.prepare(pixels))["pool"].double()
    gap = (features.mean(0) - theirs.moments.sum / theirs.count).square().sum()
    scored = result["runs"][1]
    assert scored["scores"]["frechet_distance"] >= float(gap) * 0.999
    assert scored["images"]["count"] == 20
    assert scored["versions"]["vistok"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 2
    assert "vistok benchmark runs/x" in page
    assert "from classes of the real clips" in page


def test_interrupted_shared_and_in_other_batches_it_is_the_same(pipe, videos, finished, tmp_path, monkeypatch):
    calls = []

    class Stops:
        tokenizer, generator, options = pipe.tokenizer, pipe.generator, pipe.options

        def __call__(self, *args, **kwargs):
            calls.append(kwargs)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return pipe(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(Stops(), tmp_path / "out", videos, batch_size=3)
    made = list((tmp_path / "out").rglob("*.safetensors"))
    result = run(pipe, tmp_path / "out", videos, batch_size=5)
    assert result["generated"] == 40 - sum(int(p.stem[9:]) - int(p.stem[:8]) for p in made)
    assert [r["scores"] for r in result["runs"]] == [
        {name: pytest.approx(value, rel=1e-5) for name, value in r["scores"].items()} for r in finished[1]["runs"]
    ]
    assert [r["images"]["fingerprint"] for r in result["runs"]] == [
        r["images"]["fingerprint"] for r in finished[1]["runs"]
    ]
    with pytest.raises(ResumeError, match="seed was 0 and is now 1"):
        run(pipe, tmp_path / "out", videos, seed=1)


def test_frames_are_predicted_of_the_real_clips(predictor, videos, tmp_path):
    result = run(predictor, tmp_path / "out", videos, protocol="own-4x16-given2", guidance_scales=None, num_clips=6)
    assert result["benchmark"]["labels"] == "first frames of the real clips"
    rules = video_protocol("own-4x16-given2")
    real = choose_clips(open_videos(videos), rules, real=True, name="real")
    first = next(iter(real.batches(6, 0, 6)))
    assert predictor(frames=first[:, :, :2], seed=0).pixels.shape == (6, 3, 4, 16, 16)
    assert result["runs"][0]["images"]["distinct"] > 1


def test_what_does_not_go_together_is_refused(pipe, predictor, videos, tmp_path):
    for which, options, message in (
        (pipe, {"protocol": "larp-ucf-gen"}, r"scores clips \(B, C, 16, 128, 128\)"),
        (pipe, {"protocol": "own-4x16-given2"}, "gives 2 frames; this generator takes"),
        (predictor, {}, "goes on from given frames; 'own-4x16' gives none: take larp-k600-fp"),
        (pipe, {"num_clips": 21}, "21 clips are asked for, but they follow real ones"),
        (pipe, {"protocol": "own-9"}, "unknown video protocol 'own-9'"),
        (pipe, {"reference": tmp_path}, "no videos in"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(which, tmp_path / "out", videos, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["own-0x16", "own-4x0", "own-4x16-given4"])
def test_own_protocols_have_frames_and_a_side(name):
    assert is_video_protocol(name)
    with pytest.raises(ValueError, match="is no protocol"):
        video_protocol(name)


def test_samples_are_scored_once_although_previews_lie_beside_them(pipe, videos, tmp_path):
    from vistok.pipelines.samples import write_samples

    write_samples(pipe, tmp_path / "samples", 4)
    result = evaluate_clips(tmp_path / "samples", videos, protocol=PROTOCOL, network=Colours())
    assert result["images"]["count"] == 4
    assert json.dumps(result)


def test_command_line_says_which_protocols_fit(pipe, videos, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", str(tmp_path / "pipe"), "--out", str(tmp_path / "out"), "--reference", str(videos)])
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "own-4x16" in message
    assert "larp-ucf-gen" in message
