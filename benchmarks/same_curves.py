"""Whether short seeded runs of two revisions log the same numbers, as they must before and after a refactoring.

    python benchmarks/same_curves.py              # the working tree against HEAD
    python benchmarks/same_curves.py main         # against another revision

A tokenizer with a discriminator, one of latents, and a generator of each kind train for a few steps on the digits, with
each revision and the configs of this file. All numbers in metrics.jsonl except times must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, finish, say

TIMES = ("seconds", "second", "time", "memory")
"""Parts of the names of log entries that measure the machine, such as times."""

VIT = {"dim": 16, "num_layers": 1, "num_heads": 1, "mlp_dim": 16}
GAN = {
    "weight": 0.1,
    "balance": "adaptive",
    "discriminator": {"name": "patchgan", "width": 4, "num_layers": 1},
    "start_step": 2,
    "r1_weight": 1.0,
    "r1_every": 2,
    "lecam_weight": 0.01,
}
DIGITS = {"source": "digits", "image_size": 16, "channels": 1, "batch_size": 16, "limit": 64}
TRAINING = {"max_steps": 6, "ema_decay": 0.9, "log_every": 1, "image_every": 0}
TOKENIZERS = {
    "vit_vqgan": {
        "model": {"patch_size": 4, "encoder": VIT, "decoder": VIT, "codebook_size": 32, "codebook_embed_dim": 4},
        "losses": {"l2": 1.0, "codebook": 1.0, "commitment": 0.25, "gan": GAN},
    },
    "kl_vae": {"model": {}, "losses": {"l1": 1.0, "kl": 1e-4}},
}
GENERATORS = {
    "llama": "vit_vqgan",
    "maskgit": "vit_vqgan",
    "randar": "vit_vqgan",
    "mar": "kl_vae",
    "xar": "kl_vae",
}
FROM_DATA = ("spec", "num_classes", "image_size", "in_channels")
"""Arguments in the models' ``tiny`` that are determined by the data."""


def configs(folder: Path) -> list[tuple[str, dict]]:
    """The config of every run by its name, tokenizers first."""
    from vistok.checkpoints import registry

    def model(name: str) -> dict:
        tiny = registry.entry(name).load().tiny
        return {"name": name} | {key: value for key, value in tiny.items() if key not in FROM_DATA}

    runs = []
    for name, parts in TOKENIZERS.items():
        config = {"task": "tokenizer", "output_dir": str(folder / name), "data": DIGITS, "training": TRAINING}
        runs.append((name, config | parts | {"model": model(name) | parts["model"]}))
    for name, tokenizer in GENERATORS.items():
        config = {"task": "generator", "output_dir": str(folder / name), "tokens": str(folder / f"{tokenizer}-tokens")}
        runs.append((name, config | {"model": model(name), "training": TRAINING | {"batch_size": 16}}))
    return runs


def curves(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Train every run with the imported vistok; returns the rows of its log without times."""
    import torch

    from vistok.checkpoints import load
    from vistok.data import DataConfig
    from vistok.train import train
    from vistok.train.tokenize import tokenize

    torch.set_num_threads(1)
    found = {}
    for name, config in configs(folder):
        run = train(config)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = [{k: v for k, v in row.items() if not any(part in k for part in TIMES)} for row in rows]
        if name in TOKENIZERS:
            tokenize(load(run / "tokenizer"), DataConfig(**DIGITS), folder / f"{name}-tokens")
    return found


def of_tree(tree: Path) -> dict[str, list[dict[str, float]]]:
    """``curves`` with the vistok of a source tree, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curves.json"
        command = [sys.executable, __file__, "--write", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"VISTOK_TREE": str(tree)}, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", default="HEAD")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        sys.path.insert(0, os.environ["VISTOK_TREE"])
        with tempfile.TemporaryDirectory() as folder:
            Path(options.write).write_text(json.dumps(curves(Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), options.revision], check=True)
        try:
            before, after = of_tree(tree), of_tree(ROOT)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    differing = [name for name in after if json.dumps(before[name]) != json.dumps(after[name])]
    for name in after:
        say(f"{name}: {'differs' if name in differing else 'the same'}, {len(after[name])} rows")
    numbers = sum(len(row) for rows in after.values() for row in rows)
    finish("same_curves", {"differing": float(len(differing))}, {"runs": float(len(after)), "numbers": float(numbers)})
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
