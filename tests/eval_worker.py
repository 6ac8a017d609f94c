"""One of several processes that evaluate together; started by tests with the folder of the images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from eval_data import colour_statistics
from tiny_models import tiny

from vistok.eval import evaluate, evaluate_reconstruction
from vistok.eval.benchmark import benchmark
from vistok.eval.networks import CallableNetwork
from vistok.files import write_json
from vistok.pipelines import Pipeline
from vistok.processes import Processes


def measure(folder: Path, out: Path, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
    """Scores and fingerprints of an evaluation, of reconstructions and of a benchmark."""
    torch.set_num_threads(1)
    colours = {"features": colour_statistics, "network": "colours"}
    compared = evaluate(folder / "generated", folder / "real", batch_size=4, processes=processes, **colours)
    paired = evaluate_reconstruction(
        folder / "real",
        folder / "restored",
        network=CallableNetwork(colour_statistics, "colours"),
        batch_size=4,
        processes=processes,
    )
    generated = benchmark(
        Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt")),
        out,
        num_images=24,
        protocol="torch-fidelity",
        reference=folder / "real",
        batch_size=5,
        processes=processes,
        **colours,
    )
    results = {"compared": compared, "paired": paired, "generated": generated["runs"][0]}
    return {
        name: {"scores": result["scores"], "fingerprint": result["images"]["fingerprint"]}
        for name, result in results.items()
    }


if __name__ == "__main__":
    root, group = Path(sys.argv[1]), Processes.join()
    write_json(root / f"rank-{group.index}.json", measure(root, root / "together", group))
