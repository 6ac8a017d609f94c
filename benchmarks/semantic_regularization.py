"""Whether larger tokenizers make tokens harder to predict, and semantic regularisation helps (arXiv 2504.08736).

Two sizes of GigaTok's tokenizer (on a raster, 32 px, 4x4 tokens of 512 codes) are trained for equal steps, with and
without aligning a layer of the decoder with EfficientNet-Lite0's features. Each is then evaluated as by
``vistok probe``: reconstructions of held-out images, the held-out loss of a small generator on its tokens, and linear
probes.

    python benchmarks/semantic_regularization.py --root ../shared/data/cifar10.zip --out semantic_regularization/

Runs that were stopped are resumed. ``--root`` is a folder or archive of images in folders train/ and test/,
one for each class.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import RECIPES, find, finish, say

SIZES = {
    "small": {"dim": 64, "num_layers": 1, "num_heads": 2},
    "large": {"dim": 192, "num_layers": 3, "num_heads": 3},
}
MODEL = {
    "name": "gigatok",
    "layout": "2d",
    "layer_kind": "self_attention",
    "channels": 8,
    "encoder_channel_mult": [1, 2, 4, 8],
    "decoder_channel_mult": [1, 2, 4, 8],
    "res_blocks": 1,
    "norm_groups": 8,
    "z_channels": 64,
    "codebook_size": 512,
    "codebook_embed_dim": 8,
    "entropy_temperature": 0.1,
}
TEACHER = {"weight": 0.5, "encoder": {"name": "efficientnet_lite0", "image_size": 64, "stride": 16}}  # 4x4 features
TEACHER_DIM = 112
GENERATOR = ("model.dim=128", "model.num_layers=4", "model.num_heads=4")
LOSSES = {"l2": 10.0, "codebook": 1.0, "commitment": 0.25, "entropy": 0.1}
MEASURES = ("psnr", "frechet", "loss", "generator_probe", "token_probe", "codes_used")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="images; by default the shared CIFAR-10 archive")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--tokenizer-steps", type=int, default=600)
    parser.add_argument("--generator-steps", type=int, default=400)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    arguments.root = find(arguments.root, "data/cifar10.zip", "--root")
    figures: dict[str, Any] = {}
    rows = []
    for seed in range(arguments.seeds):  # the inner loop runs the variants, so that a partial result compares them
        for size in SIZES:
            for regularised in (False, True):
                scores = measure(size, regularised, seed, arguments)
                rows.append({"size": size, "regularised": regularised, "seed": seed} | scores)
                say(f"{size:6} {'with' if regularised else 'without':8} seed {seed}: {scores}")
    print("| tokenizer | regularised | parameters | " + " | ".join(MEASURES) + " |")
    print("|---" * (3 + len(MEASURES)) + "|")
    for size in SIZES:
        for regularised in (False, True):
            own = [row for row in rows if (row["size"], row["regularised"]) == (size, regularised)]
            cells = [" / ".join(f"{row[name]:.4g}" for row in own) for name in MEASURES]
            print(f"| {size} | {'yes' if regularised else 'no'} | {own[0]['parameters']:,} | {' | '.join(cells)} |")
            for name in MEASURES:
                key = f"{name}_{size}_{'with' if regularised else 'without'}"
                figures[key] = statistics.mean(row[name] for row in own)
    ratios = {
        f"loss_large_over_small_{kind}": figures[f"loss_large_{kind}"] / figures[f"loss_small_{kind}"]
        for kind in ("without", "with")
    }
    names = ("tokenizer_steps", "generator_steps", "train_images", "test_images", "seeds")
    finish("semantic_regularization", ratios, figures | {name: getattr(arguments, name) for name in names})


def measure(size: str, regularised: bool, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The scores of one tokenizer; existing runs are reused."""
    from vistok.probing import ProbeSettings, probe

    folder = arguments.out / f"{size}-{'with' if regularised else 'without'}-{seed}"
    run = train_tokenizer(folder / "tokenizer", size, regularised, seed, arguments)
    settings = ProbeSettings(
        steps=arguments.generator_steps,
        train_images=arguments.train_images,
        test_images=arguments.test_images,
        generator=GENERATOR,
        seed=seed,
    )
    told = probe(str(run), folder / "probe", settings=settings)
    scores, generator = told["reconstruction"]["scores"], told["generator"]
    return {
        "parameters": told["tokenizer"]["parameters"],
        "psnr": scores["psnr"],
        "frechet": scores["frechet_distance"],
        "loss": generator["loss_per_token"],
        "generator_probe": generator["probe"]["accuracy"],
        "token_probe": told["feature_probes"]["tokens"]["accuracy"],
        "codes_used": told["code_usage"]["used"],
    }


def train_tokenizer(folder: Path, size: str, regularised: bool, seed: int, arguments: argparse.Namespace) -> Path:
    from vistok.config import load_config
    from vistok.train import train

    steps = arguments.tokenizer_steps
    data = [f"data.root={arguments.root}", f"data.limit={arguments.train_images}"]
    config = load_config(RECIPES / "cifar10" / "gigatok_2d.yaml", data)
    transformers = {"encoder_size": SIZES[size], "decoder_size": SIZES[size]}
    alignment = {"dim": TEACHER_DIM, "layer": 1} if regularised else None
    rhythm = {"max_steps": steps, "log_every": max(steps // 10, 1), "image_every": 0, "save_every": max(steps // 4, 1)}
    rhythm |= {"ema_decay": 0.0, "keep_checkpoints": 1}
    return train(
        config
        | {"model": MODEL | transformers | {"alignment": alignment}, "seed": seed, "output_dir": str(folder)}
        | {"losses": LOSSES | ({"repa": TEACHER} if regularised else {})}
        | {"training": config["training"] | rhythm},
        resume=folder.exists(),
    )


if __name__ == "__main__":
    main()
