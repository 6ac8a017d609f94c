"""What training costs: the tables of docs/costs.md.

python docs/costs.py                 # all tables; minutes, and up to 12 GB of memory
python docs/costs.py CONFIG…         # the rows of these configs alone

What was measured is read from the shipped reference curves. The rest is computed, and nothing is trained for it:
`vistok train CONFIG --dry-run` builds the model, counts what two samples keep and how many operations they take, and
scales it to the batch. Hours are those operations at a fixed speed. Networks whose weights are downloaded (LPIPS,
teachers, codecs) are left out. The tokens that a generator reads are made by a small tokenizer of as many, of digits.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vistok.checkpoints import registry
from vistok.config import load_config
from vistok.data import DataConfig
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.kl_vae import KLVAE
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.tokenizers.titok import TiTok
from vistok.tokenizers.var_vq import VARVQ
from vistok.train.config import RunConfig
from vistok.train.preview import DryRun, preview
from vistok.train.tasks import any_config
from vistok.train.tokenize import tokenize
from vistok.types import TokenSpec
from vistok.utils.recipes import FOLDER, find_recipe, models_of_configs, recipes

CURVES = Path(__file__).parent / "curves" / "README.md"
SHIPPED_CURVES = FOLDER.parent / "curves"

CORE, GAMES, DATA_CENTRE = 0.1e12, 40e12, 340e12
"""Operations per second: about what one core of the measured runs of `cifar10/…` reaches; about 40 % of the 100 TFLOP/s
that a GPU for games of 24 GB or less has in bf16; what LlamaGen's GPT-B reaches on an H200 (docs/performance.md)."""

FOR_A_PROCESSOR = tuple(
    name for name in recipes() if name.startswith(("cifar10/", "digits/", "emoji/", "moving_digits/"))
)
FOR_ONE_GPU = tuple(name for name in recipes() if name.startswith("photos/"))
OF_PAPERS = tuple(
    f"imagenet256/{name}"
    for name in ("llamagen_vq16", "vit_vqgan_base", "var_vq", "kl16", "llama_b", "mar_base", "xar_base", "rar_b")
)
"""The papers' recipes of which there is a row; each takes a processor minutes."""

OF_RELEASED_WEIGHTS = {"photos/llamagen_vq_256": ("llamagen_vq", "vq16"), "photos/llama_256_lora": ("llama", "L")}
"""Recipes that take their model from released weights: which it is, and of what size."""

DOWNLOADED = (
    "lpips",
    "classifier",
    "code_prediction",
    "repa",
    "repa_encoder",
    "low_level",
    "semantic",
    "semantic_contrast",
)


def main(asked: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if asked:
            show(asked, Path(scratch))
            return
        print("\n".join(measured()))
        for names in (FOR_A_PROCESSOR, FOR_ONE_GPU, OF_PAPERS):
            show(names, Path(scratch))


def measured() -> Iterator[str]:
    """The table of what the reference curves tell: of each run its steps, throughput and seconds."""
    yield from header("run", "machine", "steps", "throughput", "minutes")
    machines = {
        name: cells[3].strip().split(":")[0]
        for cells in (line.split("|") for line in CURVES.read_text().splitlines() if line.startswith("| `"))
        for name in re.findall(r"`([\w-]+)`", cells[1])
    }
    for name, machine in machines.items():
        rows = [json.loads(line) for line in (SHIPPED_CURVES / f"{name}.jsonl").read_text().splitlines()]
        (unit,) = [key for key in rows[-1] if key.endswith("_per_second")]
        rate = float(np.median([row[unit] for row in rows if unit in row]))
        minutes = f"{rows[-1]['seconds'] / 60:.1f}" if "seconds" in rows[-1] else ""
        speed = f"{float(f'{rate:.3g}'):,.0f} {unit.split('_')[0]}/s"
        yield f"| `{name}` | {machine} | {rows[-1]['step']:,} | {speed} | {minutes} |"


def show(names: Sequence[str], folder: Path) -> None:
    """Print the table of configs; what cannot be computed goes to the standard error, with the reason."""
    print(
        "", *header("config", "parameters", "samples per step", "memory", "TFLOP per step", "steps", "hours"), sep="\n"
    )
    for name in names:
        try:
            print(row(name, cost(name, folder)), flush=True)
        except Exception as error:  # of whatever kind: the other rows are wanted
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)


def header(*names: str) -> tuple[str, str]:
    return f"| {' | '.join(names)} |", "|---" * len(names) + "|"


def row(name: str, found: DryRun) -> str:
    speed = CORE if name in FOR_A_PROCESSOR else DATA_CENTRE if name in OF_PAPERS else GAMES
    batch_size = batch_in_all(name) or found.batch_size
    operations = found.operations * batch_size / found.batch_size
    memory, hours = sum(found.memory.values()) / 2**30, operations * found.steps / speed / 3600
    parameters = " + ".join(f"{count / 1e6:.1f} M" for count in found.parameters.values())
    return (
        f"| `{name}` | {parameters} | {batch_size:,} | {memory:.1f} GiB | {rounded(operations / 1e12)} | "
        f"{found.steps:,} | {rounded(hours)} |"
    )


def rounded(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def batch_in_all(name: str) -> int | None:
    """The batch of all processes, where a recipe states it beside that of one: ``# per process; 256 in all``."""
    stated = re.search(r"batch_size: \d+ +# per process; ([\d,]+) in all", find_recipe(name).read_text())
    return int(stated[1].replace(",", "")) if stated else None


def cost(name: str, folder: Path) -> DryRun:
    """The dry run of a config on one device, without what would be downloaded."""
    overrides = [f"output_dir={folder / 'run'}", "training.compile=false"]
    config = load_config(find_recipe(name), [*overrides, *data_of(name, folder)], target=any_config())
    for key in ("init_from", "freeze"):
        config.pop(key, None)
    if name in OF_RELEASED_WEIGHTS:
        model, size = OF_RELEASED_WEIGHTS[name]
        config["model"] = {"name": model, **registry.entry(model).load().sizes[size]}
    losses = config.get("losses", {})
    for term in DOWNLOADED:
        losses.pop(term, None)
    if losses.get("gan", {}).get("discriminator", {}).get("name") == "dino":
        losses.pop("gan")
    if config["training"].get("mixed_precision") == "fp16":  # which processors do not have
        config["training"]["mixed_precision"] = "bf16"
    return preview(config)


def data_of(name: str, folder: Path) -> list[str]:
    """Overrides that give a recipe something to read."""
    text = find_recipe(name).read_text()
    if "\ntask: generator\n" in text:
        return [f"tokens={tokens(name, folder)}"]
    if "source: video_list" in text:
        return [
            "data.source=moving_digits",
            "data.channels=3",
            "data.name=null",
            "data.flip=false",
            "data.num_workers=0",
        ]
    if "source: folder" in text:
        return [f"data.root={pictures(folder)}", "data.num_workers=0"]
    return []


def pictures(folder: Path) -> Path:
    """Some random pictures, as large as the largest recipe reads."""
    root = folder / "pictures" / "class"
    if not root.is_dir():
        root.mkdir(parents=True)
        for number in range(256):
            values = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / f"{number}.png")
    return root.parent


def tokens(name: str, folder: Path) -> Path:
    """Tokens of digits, as many and of the kind that the recipe's tokenizer makes."""
    cache, text = folder / name.replace("/", "-"), find_recipe(name).read_text()
    made_by = re.search(r"# +vistok tokenize (\S+)(.*)", text)
    assert made_by is not None, f"{name} does not say what makes its tokens"
    if name in FOR_A_PROCESSOR:
        tokenizer = tokenizer_of(made_by[1])
        assert tokenizer is not None, f"{made_by[1]} is no run of a recipe"
    else:
        tokenizer = small_tokenizer(spec_of_tokens(name, made_by[1], made_by[2]))
    channels, *frames, side, _ = tokenizer.input_shape
    source: dict[str, Any] = {"source": "moving_digits", "num_frames": frames[0]} if frames else {"source": "digits"}
    data = DataConfig(side, **source, channels=channels, limit=256)
    tokenize(
        tokenizer.eval(), data, cache, latents="--latents" in text, given_frames=5 if "--given-frames" in text else 0
    )
    return cache


def spec_of_tokens(name: str, run: str, options: str) -> TokenSpec:
    """Of the tokenizer that the first lines of a recipe name: that of another recipe, or the one of its paper."""
    with torch.device("meta"):
        tokenizer = tokenizer_of(run) or registry.entry(generator_of(name).tokenizer, "tokenizer").load()()
    size = re.search(r"data\.image_size=(\d+)", options)
    sides = tokenizer.input_shape[1:] if size is None else (int(size[1]), int(size[1]))
    return tokenizer.spec_for((tokenizer.input_shape[0], *sides))


def generator_of(name: str) -> registry.Entry:
    model = OF_RELEASED_WEIGHTS.get(name, (models_of_configs().get(name, ""), ""))[0]
    return registry.entry(model, "generator")


def tokenizer_of(run: str) -> Tokenizer | None:
    """That of the recipe which fills this run folder."""
    for other in recipes():
        file = find_recipe(other)
        if f"\noutput_dir: {run}\n" in file.read_text():
            config: Mapping[str, Any] = load_config(file, ["data.root=photos"])
            parsed = RunConfig.parse(config)
            return parsed.build_model(parsed.model_entry().load().arguments_from(parsed.data))
    return None


def small_tokenizer(spec: TokenSpec) -> Tokenizer:
    """One of random weights with tokens of that spec."""
    if spec.scales:
        return VARVQ(image_size=2 * spec.scales[-1][0], channels=8, channel_mult=(1, 1), norm_groups=4, res_blocks=1,
                     z_channels=spec.dim, codebook_size=spec.num_ids, scales=spec.scales)  # fmt: skip
    if spec.grid is not None and len(spec.grid) == 2:
        side = 2 * spec.grid[0]
        if not spec.discrete:
            return KLVAE(image_size=side, block_out_channels=(8, 8), layers_per_block=1, latent_channels=spec.dim,
                         encoder_attention=(), norm_groups=4)  # fmt: skip
        return LlamaGenVQ(image_size=side, channels=8, encoder_channel_mult=(1, 1), decoder_channel_mult=(1, 1),
                          norm_groups=4, z_channels=8, codebook_size=spec.num_ids)  # fmt: skip
    size = {"dim": 32, "num_layers": 1, "num_heads": 2}
    return TiTok(image_size=16, encoder_patch_size=4, decoder_patch_size=4, encoder=size, decoder=size,
                 output="pixels", num_tokens=spec.length, token_dim=8, codebook_size=spec.num_ids)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
