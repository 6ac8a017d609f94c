"""Whether tokenizers that are robust to a generator's errors give better samples (arXiv 2503.08354, 2509.12474).

ViT-VQGAN's tokenizer (32 px, 8x8 tokens of 512 codes; pixel and adversarial terms) is trained with and without the
perturbation of its latents, for equal steps. A generator is trained on the tokens of each, and makes images of partly
generated tokens of training images (`vistok pairs`). The decoder is then trained further to make the real images of
these (post-training). As a control it is trained for as many steps to reconstruct the real images.

Each decoder is judged by Frechet distances: of reconstructions of held-out images (like rFID), of reconstructions from
perturbed tokens (like pFID; the mean over the grid RATES x STRENGTHS), and of a generator's samples, the same tokens
for all decoders of a tokenizer. The features are EfficientNet-Lite0's at 64 px, averaged over places. These distances
are not FID, and with few images they are larger than with many.

    python benchmarks/post_training.py --root ../shared/data/cifar10.zip --out post_training/

Runs that were stopped are resumed. ``--root`` is a folder or archive of images in folders train/ and test/,
one for each class.
"""

from __future__ import annotations

import argparse
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from common import RECIPES, find, finish, say

MODEL = {
    "name": "vit_vqgan",
    "patch_size": 4,
    "encoder": {"dim": 96, "num_layers": 2, "num_heads": 2, "mlp_dim": 192},
    "decoder": {"dim": 96, "num_layers": 2, "num_heads": 2, "mlp_dim": 192},
    "codebook_size": 512,
    "codebook_embed_dim": 4,
}
GENERATOR = {"name": "llama", "dim": 128, "num_layers": 4, "num_heads": 4}
SAMPLING = {"guidance_scale": 2.0, "top_p": 0.95}
PERTURBATION = {"rate": 1.0, "share": 0.25, "strength": 50}
RATES, STRENGTHS = (0.3, 0.9), (50,)
ADVERSARY = {"weight": 0.1, "balance": "adaptive", "discriminator": {"name": "patchgan", "width": 32, "num_layers": 2}}
MEASURES = ("psnr", "reconstructions", "perturbed", "samples")
STAGES = ("before", "post-training", "more training")
SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="images; by default the shared CIFAR-10 archive")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--tokenizer-steps", type=int, default=600)
    parser.add_argument("--generator-steps", type=int, default=400)
    parser.add_argument("--post-steps", type=int, default=200)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=2000, help="training images that pairs are made of")
    parser.add_argument("--sigma", type=float, default=0.7, help="share of the tokens that are kept in them")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    arguments.root = find(arguments.root, "data/cifar10.zip", "--root")
    rows = []
    for seed in range(arguments.seeds):  # the inner loop runs the variants, so that a partial result compares them
        for perturbed in (False, True):
            for stage, scores in measure(perturbed, seed, arguments).items():
                rows.append(({"stage": stage, "perturbation": perturbed}, scores))
                say(f"{'with' if perturbed else 'without':8} seed {seed} {stage}: {scores}")
    print("| perturbation | decoder | " + " | ".join(MEASURES) + " |")
    print("|---" * (2 + len(MEASURES)) + "|")
    figures: dict[str, Any] = {}
    for perturbed in (False, True):
        for stage in STAGES:
            own = [scores for what, scores in rows if what == {"stage": stage, "perturbation": perturbed}]
            cells = [" / ".join(f"{scores[name]:.4g}" for scores in own) for name in MEASURES]
            print(f"| {'yes' if perturbed else 'no'} | {stage} | {' | '.join(cells)} |")
            for name in MEASURES:
                figures[key(name, perturbed, stage)] = statistics.mean(scores[name] for scores in own)
    ratios = {
        f"{key('samples', perturbed, STAGES[1])}_over_{plain(other)}": figures[key("samples", perturbed, STAGES[1])]
        / figures[key("samples", perturbed, other)]
        for perturbed in (False, True)
        for other in (STAGES[0], STAGES[2])
    }
    settings = {name: value for name, value in vars(arguments).items() if name not in ("root", "out")}
    finish("post_training", ratios, figures | settings | {"rates": str(RATES), "strengths": str(STRENGTHS)})


def key(measure: str, perturbed: bool, stage: str) -> str:
    return f"{measure}_{'with' if perturbed else 'without'}_{plain(stage)}"


def plain(stage: str) -> str:
    return stage.replace(" ", "_").replace("-", "_")


def measure(perturbed: bool, seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The scores of a tokenizer with each decoder of ``STAGES``; existing runs are reused."""
    from vistok.pipelines import pipeline
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.pairs import write_pairs
    from vistok.train.tokenize import tokenize

    folder, steps = arguments.out / f"{'with' if perturbed else 'without'}-{seed}", arguments.tokenizer_steps
    changes: dict[str, Any] = {"model": MODEL, "losses": losses(steps // 2)}
    changes["data"] = {"root": str(arguments.root), "limit": arguments.train_images, "batch_size": 64}
    changes |= {"perturbation": PERTURBATION} if perturbed else {}
    run = learn("vit_vqgan", folder / "tokenizer", steps, seed, changes)

    tokens, pairs = folder / "tokens", folder / "pairs"
    if not tokens.exists():
        tokenize(load_tokenizer(run), images(arguments, "train", arguments.train_images), tokens)
    changes = {"tokens": str(tokens), "model": GENERATOR, "sampling": SAMPLING}
    pipe = pipeline(learn("llama", folder / "generator", arguments.generator_steps, seed, changes), device="cpu")
    if not pairs.exists():
        write_pairs(pipe, images(arguments, "train", arguments.pairs), pairs, sigma=arguments.sigma, seed=seed)

    runs = {STAGES[0]: run}
    for stage, read in zip(STAGES[1:], ("generated", "real")):
        data = {"root": str(pairs / read), "target_root": str(pairs / "real"), "split": None, "flip": False}
        data |= {"crop": "center", "batch_size": 64}
        changes = {"model": MODEL, "losses": losses(0), "data": data, "init_from": str(run), "decoder_only": True}
        runs[stage] = learn("vit_vqgan", folder / plain(stage), arguments.post_steps, seed, changes, lr=3e-4)

    made = pipe(range(10), num_images_per_label=arguments.samples // 10, seed=seed).tokens
    return {stage: judge(load_tokenizer(run), made, seed, arguments) for stage, run in runs.items()}


def losses(gan_start: int) -> dict[str, Any]:
    return {"l2": 10.0, "codebook": 1.0, "commitment": 0.25, "gan": ADVERSARY | {"start_step": gan_start}}


def images(arguments: argparse.Namespace, split: str, limit: int) -> Any:
    from vistok.data import DataConfig

    return DataConfig(32, root=str(arguments.root), split=split, limit=limit, cache="memory")


def learn(recipe: str, folder: Path, steps: int, seed: int, changes: dict[str, Any], lr: float | None = None) -> Path:
    """Train by a recipe with changed sections; ``model``, ``losses`` and ``sampling`` are replaced as a whole."""
    from vistok.config import load_config
    from vistok.train import train

    config = load_config(RECIPES / "cifar10" / f"{recipe}.yaml")
    rhythm = {"max_steps": steps, "log_every": max(steps // 10, 1), "image_every": 0, "save_every": max(steps // 2, 1)}
    rhythm |= {"ema_decay": 0.98, "keep_checkpoints": 1}
    data = {"data": config.get("data", {}) | changes["data"]} if "data" in changes else {}
    optimizer = config["optimizer"] | ({} if lr is None else {"lr": lr})
    schedule = config["lr_scheduler"] | {"warmup_steps": max(steps // 20, 1)}
    config |= changes | data | {"seed": seed, "output_dir": str(folder), "optimizer": optimizer}
    config |= {"lr_scheduler": schedule, "training": config["training"] | rhythm}
    return train(config, resume=folder.exists())


def judge(tokenizer: Any, samples: Any, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """PSNR, and the three distances; ``samples`` are tokens of a generator, (N, L)."""
    from vistok.eval.images import TensorImages
    from vistok.eval.metrics import frechet_distance
    from vistok.eval.perturbation import Grid, evaluate_perturbation
    from vistok.eval.tokenizers import evaluate_tokenizer

    held_out = images(arguments, "test", arguments.test_images)
    grid = Grid(RATES, STRENGTHS)
    scores = evaluate_perturbation(tokenizer, held_out, network(), grid=grid, seed=seed)["scores"]
    pixels = TensorImages(decoded(tokenizer, samples))
    return {
        "psnr": evaluate_tokenizer(tokenizer, held_out)["scores"]["psnr"],
        "reconstructions": scores["frechet_distance"],
        "perturbed": scores["perturbed_frechet_distance"],
        "samples": frechet_distance(gaussian(pixels), real(arguments.root, arguments.test_images)),
    }


def decoded(tokenizer: Any, tokens: Any) -> Any:
    """Pixels (N, C, H, W) in [-1, 1] of ids (N, L)."""
    import torch

    with torch.no_grad():
        return torch.cat([tokenizer.eval().decode(part).clamp(-1, 1) for part in tokens.split(100)])


@cache
def network() -> Any:
    import torch

    from vistok.eval.networks import CallableNetwork
    from vistok.probing.networks import EfficientNetPool

    pool = EfficientNetPool(None, torch.device("cpu"), side=SIDE)
    return CallableNetwork(pool, f"efficientnet-lite0 at {SIDE} px, pooled")


def gaussian(pictures: Any) -> Any:
    from vistok.eval.features import extract_features

    return extract_features(pictures, network(), moments=["pool"]).moments["pool"].gaussian


@cache
def real(root: Path, count: int) -> Any:
    """The feature moments of the held-out images."""
    from vistok.data import DataConfig
    from vistok.eval.tokenizers import DataImages

    return gaussian(DataImages(DataConfig(32, root=str(root), split="test", limit=count)))


if __name__ == "__main__":
    main()
