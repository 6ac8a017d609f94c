"""Gains and costs of the autoregressive prior of LARP (arXiv 2410.21264): training with and without it.

A tokenizer is trained with and without ``losses.ar_prior``, then a generator on its tokens, all for equal steps.
Reported on held-out data: the generator's loss in nats per token, the perplexity of code usage, and the PSNR of
reconstructions in dB. The systems are LARP on moving digits, by the recipe of its quickstart, and, if the archive is
available, ViT-VQGAN with 16 tokens on CIFAR-10, by recipes shortened to minutes on a CPU.

    python benchmarks/ar_prior.py --root ../shared/data/cifar10.zip --out ar_prior/
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import RECIPES, finish, say

from vistok.config import load_config
from vistok.data import DataConfig
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.runs import data_of_run
from vistok.quickstart.scores import cached_tokens
from vistok.quickstart.systems import config_file
from vistok.train import train
from vistok.train.tokenize import tokenize

PRIOR = {"weight": 0.06, "num_layers": 2, "num_heads": 4, "dim": 128}
HELD_OUT = 300  # images or clips
SMALL = ["data.batch_size=32", "lr_scheduler.warmup_steps=30", "training.ema_decay=0"]
SMALL_LLAMA = ["model.dim=128", "model.num_layers=4", "training.batch_size=32", *SMALL[1:]]
SYSTEMS = {  # recipes of the tokenizer and of the generator, with changes
    "larp": ((config_file("larp", "tokenizer"), SMALL), (config_file("larp", "generator"), SMALL_LLAMA)),
    "vit_vqgan": (
        (RECIPES / "cifar10" / "vit_vqgan.yaml", [*SMALL, "model.patch_size=8"]),
        (RECIPES / "cifar10" / "llama.yaml", [*SMALL_LLAMA, "training.mixed_precision=no"]),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="cifar10.zip; without it only LARP is tried")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs, which must not exist")
    parser.add_argument("--tokenizer-steps", type=int, default=500)
    parser.add_argument("--generator-steps", type=int, default=500)
    parser.add_argument("--train-images", type=int, default=2000, help="that the generator learns from, at most")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    ratios, figures = {}, {}
    for system in SYSTEMS if arguments.root else ["larp"]:
        for prior in (False, True):
            scores = [measure(system, prior, seed, arguments) for seed in range(arguments.seeds)]
            for name in scores[0]:
                values = [score[name] for score in scores]
                figures[f"{system}_{name}_{'with' if prior else 'without'}"] = statistics.mean(values)
                say(f"{system:10} {'with' if prior else 'without':8} {name:10} {values}")
        for name in ("nats", "psnr"):
            ratios[f"{system}_{name}_with_over_without"] = (
                figures[f"{system}_{name}_with"] / figures[f"{system}_{name}_without"]
            )
    names = ("tokenizer_steps", "generator_steps", "train_images", "seeds")
    finish("ar_prior", ratios, figures | {name: getattr(arguments, name) for name in names})


def measure(system: str, prior: bool, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The generator's held-out loss in nats per token, the perplexity of held-out codes, and the tokenizer's held-out
    PSNR, for one seed."""
    (first, first_changes), (second, second_changes) = SYSTEMS[system]
    folder = arguments.out / f"{system}-{'with' if prior else 'without'}-{seed}"
    root = [] if system == "larp" else [f"data.root={arguments.root}"]
    config = load_config(first, [*first_changes, *root])
    losses = {name: value for name, value in config["losses"].items() if name != "ar_prior"}
    held_out = {"data": {"split": "test", "limit": HELD_OUT}}
    run = train(
        config
        | {"losses": losses | ({"ar_prior": PRIOR} if prior else {}), "seed": seed, "validation": held_out}
        | {"output_dir": str(folder / "tokenizer"), "training": rhythm(config, arguments.tokenizer_steps)}
    )
    tokenizer = load_tokenizer(run)
    caches = {}
    for split, limit in (("train", arguments.train_images), ("test", HELD_OUT)):
        changes = [f"data.split={split}", f"data.limit={limit}"]
        data: DataConfig = data_of_run(run, changes, input_shape=tokenizer.input_shape)
        caches[split] = tokenize(tokenizer, data, folder / split)
    config = load_config(second, [*second_changes, f"tokens={folder / 'train'}"])
    generator = train(
        config
        | {"seed": seed, "validation": {"tokens": str(folder / "test")}}
        | {"output_dir": str(folder / "generator"), "training": rhythm(config, arguments.generator_steps)}
    )
    return {
        "nats": best(generator, "val_loss", min),
        "perplexity": perplexity(cached_tokens(caches["test"]), tokenizer.spec.num_ids),
        "psnr": best(run, "val_psnr", max),
    }


def perplexity(ids: torch.Tensor, num_ids: int) -> float:
    """The perplexity of code usage: the exponential of the entropy, in nats, of the ids' frequencies."""
    shares = torch.bincount(ids.flatten(), minlength=num_ids).double() / ids.numel()
    return float(torch.special.entr(shares).sum().exp())


def rhythm(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """The training section of a config for ``steps`` steps, with ten measurements."""
    every = max(steps // 10, 1)
    return config["training"] | {"max_steps": steps, "save_every": every, "log_every": every, "image_every": 0}


def best(run: Path, name: str, choose) -> float:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return choose(row[name] for row in rows if name in row)


if __name__ == "__main__":
    main()
