"""`vistok eval` beside torch-fidelity's own command line: the same folders, the same weights file, the same scores."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.eval_data import inception_weights, write_folder

from vistok.cli import main

torch.set_num_threads(1)

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10.zip"
COUNTS = (16, 12)  # generated and real images
# Rounding in torch-fidelity: its trace term takes square roots of eigenvalues that are 0 (fewer images than
# features; 4e-9 with more), its kernel distance is a difference of float32 sums, its shares are float32 means.
TOLERANCES = {"fid": 1e-4, "is": 1e-6, "is_std": 1e-5, "kid": 2e-4, "kid_std": 2e-4}
TOLERANCES |= dict.fromkeys(("precision", "recall", "f_score"), 1e-7)
THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "is": "inception_score_mean",
    "is_std": "inception_score_std",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
    "f_score": "f_score",
}


def photographs() -> np.ndarray:
    """CIFAR-10 images of all classes where the data set is there, else embedded digits: uint8 (N, H, W, 3)."""
    count = sum(COUNTS)
    if CIFAR10.exists():
        with zipfile.ZipFile(CIFAR10) as archive:
            names = sorted(name for name in archive.namelist() if "/test/" in name and name.endswith(".jpg"))
            chosen = names[:: len(names) // count][:count]
            return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in chosen])
    from sklearn.datasets import load_digits

    return (load_digits().images[:count] * 15.9).astype(np.uint8)[..., None].repeat(3, axis=-1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return inception_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


def torch_fidelitys_scores(generated: Path, real: Path, weights: Path) -> dict[str, float]:
    executable = Path(sys.executable).with_name("fidelity")
    if not executable.exists():
        pytest.skip("torch-fidelity's command is not installed beside Python")
    command = [
        executable, "--input1", generated, "--input2", real, "--isc", "--fid", "--kid", "--prc", "--cpu", "--json",
        "--silent", "--no-cache", "--save-cpu-ram", "--kid-subset-size", min(COUNTS),
        "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def vistoks_scores(generated: Path, real: Path, weights: Path, out: Path) -> dict[str, float]:
    command = ["eval", generated, "--reference", real, "--weights", weights, "--batch-size", 7, "--out", out]
    with pytest.raises(SystemExit) as end:
        main(list(map(str, command)))
    assert not end.value.code
    return json.loads(out.read_text())["scores"]


def test_scores_are_those_of_torch_fidelitys_command_line(weights, tmp_path):
    pixels = photographs()
    generated = write_folder(tmp_path / "generated", pixels[: COUNTS[0]])
    real = write_folder(tmp_path / "real", pixels[COUNTS[0] :])
    theirs = torch_fidelitys_scores(generated, real, weights)
    ours = vistoks_scores(generated, real, weights, tmp_path / "scores.json")
    assert set(ours) == set(THEIR_NAMES)
    print(
        *(f"{name} {score:.9g} {score / theirs[THEIR_NAMES[name]] - 1:.1e}" for name, score in ours.items()), sep="\n"
    )
    for name, score in ours.items():
        assert score == pytest.approx(theirs[THEIR_NAMES[name]], rel=TOLERANCES[name]), name
    assert ours["fid"] > 0.01
    assert min(ours["is_std"], ours["kid_std"]) > 0
