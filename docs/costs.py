"""What training by the recipes for one GPU costs, computed: the table of docs/costs.md.

python docs/costs.py [CONFIG…]

Nothing is trained: `vistok train CONFIG --dry-run` builds the model, counts what two samples keep and how many
operations they take, and scales it to the batch. Hours are those operations at a fixed speed. LPIPS, whose weights are
downloaded, is left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vistok.config import load_config
from vistok.data import DataConfig
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.train.preview import preview
from vistok.train.tasks import any_config
from vistok.train.tokenize import tokenize
from vistok.utils.recipes import find_recipe

CONFIGS = ("photos/llamagen_vq_128", "photos/llama_128", "cifar10/llamagen_vq", "cifar10/llama")
SPEED = 40e12
"""Operations per second: 40 % of the 100 TFLOP/s that a GPU for games of 24 GB or less has in bf16, about."""
GRIDS = {"photos/llama_128": 16, "cifar10/llama": 8}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    header = ("config", "parameters", "samples per step", "memory", "operations per step", "steps", "hours")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or CONFIGS:
            print(row(name, Path(scratch)), flush=True)


def row(name: str, folder: Path) -> str:
    """One line of the table."""
    source = [f"tokens={tokens(name, folder)}"] if name in GRIDS else [f"data.root={pictures(folder)}"]
    overrides = [*source, f"output_dir={folder / 'run'}"]
    config = load_config(find_recipe(name), overrides, target=any_config())
    terms = config.get("losses", {})
    terms.pop("lpips", None)  # whose weights would be downloaded
    found = preview(config)
    memory, hours = sum(found.memory.values()) / 2**30, found.operations * found.steps / SPEED / 3600
    parameters = " + ".join(f"{count / 1e6:.1f} M" for count in found.parameters.values())
    return (
        f"| `{name}` | {parameters} | {found.batch_size} | {memory:.1f} GiB | {found.operations / 1e12:.2g} TFLOP | "
        f"{found.steps:,} | {hours:.2g} |"
    )


def pictures(folder: Path) -> Path:
    """Some random pictures, as large as the largest recipe reads."""
    root = folder / "pictures" / "class"
    if not root.is_dir():
        root.mkdir(parents=True)
        for number in range(64):
            values = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / f"{number}.png")
    return root.parent


def tokens(name: str, folder: Path) -> Path:
    """Tokens of digits by an untrained tokenizer of the grid that the recipe's tokenizer has."""
    cache = folder / name.replace("/", "-")
    small = {"channels": 8, "norm_groups": 4, "z_channels": 8, "codebook_size": 4096}
    sides = {f"{side}_channel_mult": [1, 1, 1] for side in ("encoder", "decoder")}
    tokenizer = LlamaGenVQ(image_size=4 * GRIDS[name], **small, **sides)
    tokenize(tokenizer.eval(), DataConfig(4 * GRIDS[name], source="digits", limit=128), cache)
    return cache


if __name__ == "__main__":
    main(sys.argv[1:])
