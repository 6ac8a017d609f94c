"""One of several processes that evaluate together; tests start it with the folder of the images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.eval_data import batch_statistics
from support.tiny_models import tiny
from torch import Tensor

from vistok.data.config import DataConfig
from vistok.eval import evaluate, evaluate_reconstruction
from vistok.eval.benchmark import benchmark
from vistok.eval.clip_benchmark import benchmark_clips
from vistok.eval.networks import CallableNetwork
from vistok.eval.perturbation import Grid, evaluate_perturbation
from vistok.pipelines import Pipeline
from vistok.utils.files import write_json
from vistok.utils.processes import ALONE, Processes


class ClipColours:
    """Features of clips: the brightness of each frame, and its spread."""

    name, resize, weights_sha256 = "clip colours", "none", None

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.cat([clips.mean((1, 3, 4)), clips.std((1, 3, 4))], 1)}


def write_clips(root: Path, count: int = 9, length: int = 9) -> None:
    """Videos as folders of frames, of two classes; more clips than one process generates at a time."""
    generator = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"action{number % 2}" / str(number)
        folder.mkdir(parents=True)
        for frame in range(length):
            pixels = generator.integers(0, 256, (18, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{frame}.png")


def measure(folder: Path, out: Path, processes: Processes = ALONE, batch_size: int = 4) -> dict[str, Any]:
    """Scores and fingerprints of an evaluation, of reconstructions, of a tokenizer's pFID and of benchmarks."""
    torch.set_num_threads(1)
    colours = {"features": batch_statistics, "network": "colours"}
    compared = evaluate(folder / "generated", folder / "real", batch_size=batch_size, processes=processes, **colours)
    paired = evaluate_reconstruction(
        folder / "real",
        folder / "restored",
        network=CallableNetwork(batch_statistics, "colours"),
        batch_size=batch_size,
        processes=processes,
    )
    generated = benchmark(
        Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt")),
        out,
        num_images=24,
        protocol="torch-fidelity",
        reference=folder / "real",
        batch_size=batch_size + 1,
        processes=processes,
        **colours,
    )
    tokenizer = tiny("larp", image_size=16)
    moving = benchmark_clips(
        Pipeline(tokenizer, tiny("llama", spec=tokenizer.spec, num_classes=2, positions="learned")),
        out.with_name(f"{out.name}-clips"),
        reference=folder / "clips",
        protocol="own-4x16",
        network=ClipColours(),
        batch_size=batch_size + 1,
        processes=processes,
    )
    perturbed = evaluate_perturbation(
        tiny("vit_vqgan"),
        DataConfig(image_size=16, root=str(folder / "real"), split=None, batch_size=batch_size),
        CallableNetwork(batch_statistics, "colours"),
        grid=Grid((0.5,), (8,)),
        processes=processes,
    )
    results = {"compared": compared, "paired": paired, "perturbed": perturbed, "generated": generated["runs"][0]}
    results["moving"] = moving["runs"][0]
    return {
        name: {"scores": result["scores"], "fingerprint": result["images"].get("fingerprint")}
        for name, result in results.items()
    }


if __name__ == "__main__":
    root, group = Path(sys.argv[1]), Processes.join()
    write_json(root / f"rank-{group.index}.json", measure(root, root / "together", group))
