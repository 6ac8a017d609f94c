"""`vistok eval` against torch-fidelity's command line, and against itself for other ways to read the same images.

Both commands score CIFAR-10's test images against its training images with the same weights of Inception (random ones
if none are given, since the published ones need a download). vistok runs in batches of 7, 32 and 50, from a folder, an
.npz and webdataset shards in another order, in one process and in two. The relative differences of all scores are
printed.

    python benchmarks/parity.py --data ../shared/data/cifar10.zip --images 100 80

Single-threaded, one image costs about 0.3 s of Inception, eight times over.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from common import ROOT, find, finish, say
from evaluation import random_weights
from PIL import Image

THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "is": "inception_score_mean",
    "is_std": "inception_score_std",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="cifar10.zip: cifar10/{train,test}/CLASS/NUMBER.jpg")
    parser.add_argument("--images", type=int, nargs=2, default=(100, 80), help="test images and training images")
    parser.add_argument("--weights", type=Path, help="weights file of inception-v3-compat; random ones if not given")
    arguments = parser.parse_args()
    data = find(arguments.data, "data/cifar10.zip", "--data")
    with tempfile.TemporaryDirectory() as folder:
        compare(data, arguments.images, arguments.weights, Path(folder))


def compare(data: Path, counts: tuple[int, int], weights: Path | None, folder: Path) -> None:
    if weights is None:
        weights = folder / "inception.pth"
        torch.save(random_weights(), weights)
    generated, real = (read(data, split, count) for split, count in zip(("test", "train"), counts))
    images, reference = write_folder(folder / "test", generated), write_folder(folder / "train", real)
    ours = vistok(images, reference, weights, "--batch-size", "32")
    theirs = fidelity(images, reference, weights, min(1000, *counts))
    worst = {"torch_fidelity": 0.0, "itself": 0.0}
    for name, other in THEIR_NAMES.items():
        difference = relative(ours[name], theirs[other])
        worst["torch_fidelity"] = max(worst["torch_fidelity"], difference)
        say(f"{name}: {ours[name]:.9g}, torch-fidelity {theirs[other]:.9g}, relative difference {difference:.1e}")
    np.savez(folder / "test.npz", generated)
    readings = {
        "batches of 7": vistok(images, reference, weights, "--batch-size", "7"),
        "batches of 50": vistok(images, reference, weights, "--batch-size", "50"),
        "from an .npz": vistok(folder / "test.npz", reference, weights),
        "from shards": vistok(write_shards(folder / "shards", images), reference, weights),
        "two processes": vistok(images, reference, weights, processes=2),
    }
    for reading, scores in readings.items():
        difference = max(relative(scores[name], ours[name]) for name in ours)
        worst["itself"] = max(worst["itself"], difference)
        say(f"{reading}: largest relative difference of a score {difference:.1e}")
    finish("parity", {}, {f"largest_difference_from_{name}": f"{value:.1e}" for name, value in worst.items()})


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-12)


def read(data: Path, split: str, count: int) -> np.ndarray:
    """Images uint8 (count, 32, 32, 3), evenly spread over the classes."""
    with zipfile.ZipFile(data) as archive:
        names = sorted(name for name in archive.namelist() if f"/{split}/" in name and name.endswith(".jpg"))
        chosen = names[:: len(names) // count][:count]
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in chosen])


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def write_shards(folder: Path, images: Path) -> Path:
    """Two shards of the files of a folder, in reverse order."""
    folder.mkdir()
    files = sorted(images.iterdir(), reverse=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for file in files[shard::2]:
                archive.add(file, file.name)
    return folder


def vistok(images: Path, reference: Path, weights: Path, *options: str, processes: int = 1) -> dict[str, float]:
    out = reference.with_name("scores.json")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "vistok", "eval", str(images), "--reference", str(reference)]
    run([*command, "--weights", str(weights), "--out", str(out), *options])
    return json.loads(out.read_text())["scores"]


def fidelity(images: Path, reference: Path, weights: Path, subset_size: int) -> dict[str, float]:
    command = [
        str(Path(sys.executable).with_name("fidelity")), "--input1", str(images), "--input2", str(reference),
        "--isc", "--fid", "--kid", "--prc", "--cpu", "--json", "--silent", "--no-cache", "--save-cpu-ram",
        "--kid-subset-size", str(subset_size), "--feature-extractor", "inception-v3-compat",
        "--feature-extractor-weights-path", str(weights),
    ]  # fmt: skip
    return json.loads(run(command))


def run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
