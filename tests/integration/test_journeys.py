"""Two workflows of users, command by command, on runs of seconds; test_road.py has the one from released weights to a
picture. A stand-in replaces Inception, whose weights would be downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.eval_data import FakeInception, smooth_images
from support.images import picture
from support.tiny_models import tiny

from vistok.cli import main
from vistok.eval.networks import InceptionV3Compat
from vistok.pipelines import Pipeline

pytestmark = pytest.mark.slow

TINY_VQ = (
    "data.image_size=16", "data.batch_size=4", "data.num_workers=0", "model.channels=8", "model.norm_groups=4",
    "model.z_channels=8", "model.encoder_channel_mult=[1,1,1]", "model.decoder_channel_mult=[1,1,1]",
    "model.codebook_size=32", "training.mixed_precision=no", "training.max_steps=2", "training.image_every=0",
)  # fmt: skip
TINY_LLAMA = ("training.mixed_precision=no", "training.max_steps=2", "training.batch_size=4", "training.image_every=0")


@pytest.fixture(autouse=True)
def inception(monkeypatch):
    monkeypatch.setattr(InceptionV3Compat, "load", lambda weights=None, *, resize, device: FakeInception(resize))


@pytest.fixture
def vistok_command(monkeypatch, capsys):
    """Run a command that succeeds; return all that it printed."""

    def run(*arguments: object) -> str:
        texts = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["vistok", *texts])
        with pytest.raises(SystemExit) as end:
            main(texts)
        printed = capsys.readouterr()
        assert not end.value.code, printed.err
        return printed.out + printed.err

    return run


def odd_photos(folder: Path, classes: dict[str, int]) -> Path:
    """A folder per class as people have them: several formats and modes, and files that are no images."""
    kinds = (("jpg", "RGB"), ("png", "RGBA"), ("gif", "P"), ("webp", "RGB"), ("tiff", "L"), ("PNG", "LA"))
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            ending, mode = kinds[number % len(kinds)]
            picture(number, (24 + number, 20)).convert(mode).save(folder / name / f"IMG {number}.{ending}")
        (folder / name / "Thumbs.db").write_bytes(b"\x00")
        (folder / name / "notes.txt").write_text("no image")
        (folder / name / "._IMG 0.jpg").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves on foreign disks
    return folder


def test_own_photos_become_a_generator_that_is_tuned_to_other_classes(tmp_path, vistok_command):
    pets = odd_photos(tmp_path / "pets", {"cat": 6, "dog": 6})
    vistok_command("configs", "cifar10/llamagen_vq", "--copy", tmp_path)
    vistok_command("train", tmp_path / "llamagen_vq.yaml", f"data.root={pets}", f"output_dir={tmp_path}/vq", *TINY_VQ)
    assert "PSNR" in vistok_command("reconstruct", tmp_path / "vq", pets / "cat", "--out", tmp_path / "r.png")
    vistok_command("tokenize", tmp_path / "vq", "--augmentation", "flip", "--out", tmp_path / "tokens")
    size = ("model.dim=16", "model.num_layers=1", "model.num_heads=2")
    vistok_command(
        "train", "cifar10/llama", f"tokens={tmp_path}/tokens", f"output_dir={tmp_path}/llama", *size, *TINY_LLAMA
    )

    birds = odd_photos(tmp_path / "birds", {"crow": 5, "kite": 5, "wren": 5})
    vistok_command("tokenize", tmp_path / "vq", f"data.root={birds}", "--out", tmp_path / "bird-tokens")
    printed = vistok_command(
        "train", "photos/llama_256_lora", f"tokens={tmp_path}/bird-tokens", f"init_from={tmp_path}/llama",
        f"output_dir={tmp_path}/birds-llama", "training.lora.rank=2", *TINY_LLAMA,
    )  # fmt: skip
    assert "has 2 classes and this run 3" in " ".join(printed.split())
    vistok_command("sample", tmp_path / "birds-llama", "--classes", "wren,crow", "--num", 4, "--out", tmp_path / "made")
    assert json.loads((tmp_path / "made" / "samples.json").read_text())["labels"] == [2, 0, 2, 0]
    scores = vistok_command("eval", tmp_path / "made", "--reference", birds, "--protocol", "torch-fidelity",
                            "--metrics", "fid", "--crop", 16, "--out", tmp_path / "scores.json")  # fmt: skip
    assert "fid" in scores
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["fid"] > 0


def test_samples_of_others_are_scored_and_guidance_is_swept(tmp_path, vistok_command):
    np.savez(tmp_path / "theirs.npz", smooth_images(12, seed=0, size=16))
    np.savez(tmp_path / "real.npz", smooth_images(12, seed=1, size=16))
    printed = vistok_command("eval", tmp_path / "theirs.npz", "--reference", tmp_path / "real.npz", "--protocol",
                             "torch-fidelity", "--metrics", "fid,is")  # fmt: skip
    assert "fid" in printed
    Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt")).save_pretrained(tmp_path / "pipe")
    command = ("benchmark", tmp_path / "pipe", "--num", 12, "--reference", tmp_path / "real.npz", "--protocol",
               "torch-fidelity", "--guidance-sweep", "1.0,2.0", "--out", tmp_path / "bench")  # fmt: skip
    vistok_command(*command)
    vistok_command(*command)  # which reuses the existing features
    found = json.loads((tmp_path / "bench" / "result.json").read_text())
    assert [run["guidance_scale"] for run in found["runs"]] == [1.0, 2.0]
    assert (tmp_path / "bench" / "report.html").exists()
