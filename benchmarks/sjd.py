"""Several tokens per pass: plain decoding, speculative Jacobi decoding (SJD), and Token-Shuffle's windows.

    python benchmarks/sjd.py --digits quickstart/ --minutes 3 --generator-minutes 4 --out runs/sjd

On digits and on CIFAR-10 two generators are trained on the same tokens, for the same number of steps: windows of 1 x 1,
which are plain next-token prediction, and windows of 2 x 2. The first is sampled by each decoding, the second plainly.
For each:

- **calls** of the transformer, the mean over images; the call that reads the condition and gives the first token or
  window counts. SJD commits each row separately, so an image takes the same number of calls in any batch;
- **seconds** for an image that is sampled alone, the mean over a few; decodings alternate;
- the share **recognised** as the class asked for, by the quickstart's classifier of digits or the fixed classifier of
  CIFAR-10.

``--digits`` is a folder of ``vistok quickstart --system token_shuffle``, whose windows of 2 x 2 are scored.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar10 import train_for, train_steps
from common import RECIPES, find, finish, load_instrument, say
from torch import Tensor

from vistok.config import load_config
from vistok.data import DataConfig
from vistok.data.captions import NUMBERS
from vistok.draws import Keys
from vistok.generators.base import Session
from vistok.pipelines import Pipeline, pipeline
from vistok.pipelines.folders import load_tokenizer
from vistok.quickstart.scores import fit_classifier, load_digits
from vistok.quickstart.systems import config_file
from vistok.train.tokenize import tokenize
from vistok.types import Condition

CLASSES = 10
SJD = {"decoding": "jacobi"}
PLAIN = "plain"
Recognise = Callable[[Tensor], Tensor]


def main() -> None:
    arguments = parse_arguments()
    out = Path(arguments.out or tempfile.mkdtemp(prefix="vistok-sjd-"))
    ratios, figures = {}, {}
    for name, (single, windows, recognise) in (
        ("digits", digits(arguments, out / "digits")),
        ("cifar10", cifar10(arguments, out / "cifar10")),
    ):
        measured = compare(single, windows, recognise, arguments)
        for way, row in measured.items():
            say(f"{name:8} {way:16} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
            figures |= {f"{name}_{key}_{way}": value for key, value in row.items()}
            if way != PLAIN:
                ratios[f"{name}_calls_{way}"] = row["calls"] / measured[PLAIN]["calls"]
                ratios[f"{name}_seconds_{way}"] = row["seconds"] / measured[PLAIN]["seconds"]
    say(f"everything is in {out}")
    finish("sjd", ratios, figures | {"num": arguments.num, "window": arguments.window})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, required=True, help="a quickstart of token_shuffle")
    parser.add_argument("--minutes", type=float, default=3, help="training time of the tokenizer of CIFAR-10")
    parser.add_argument("--generator-minutes", type=float, default=4, help="of its next-token generator")
    parser.add_argument("--images", type=int, default=20_000, help="training images of CIFAR-10 that are tokenized")
    parser.add_argument("--num", type=int, default=500, help="images that are scored of each")
    parser.add_argument("--alone", type=int, default=10, help="images that are sampled alone, for the time")
    parser.add_argument("--window", type=int, default=16, help="positions that a pass of SJD is fed")
    parser.add_argument("--data", help="CIFAR-10 as a .zip or folder in ImageFolder layout")
    parser.add_argument("--instrument", help="the module of the classifier of CIFAR-10")
    parser.add_argument("--out", help="folder for the runs; a temporary one by default")
    return parser.parse_args()


def digits(arguments: argparse.Namespace, out: Path) -> tuple[Pipeline, Pipeline, Recognise]:
    """Generators of single tokens and of windows, prompted by texts such as "a seven", and a classifier of digits."""
    config = config_file("token_shuffle", "generator")
    steps = load_config(config)["training"]["max_steps"]
    tokens = f"tokens={arguments.digits / 'tokens'}"
    single = train_steps(config, steps, out / "single", [tokens, "model.window=1"])
    classifier = fit_classifier(load_digits("train"), steps=600)
    return pipeline(single), pipeline(arguments.digits / "generator"), classifier.predict


def cifar10(arguments: argparse.Namespace, out: Path) -> tuple[Pipeline, Pipeline, Recognise]:
    """Class-conditional generators of single tokens and of windows, and the fixed classifier."""
    data = find(arguments.data, "data/cifar10.zip", "--data")
    instrument = find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument")
    recipes = RECIPES / "cifar10"
    codec = train_for(recipes / "llamagen_vq.yaml", arguments.minutes, out / "tokenizer", [f"data.root={data}"])
    seen = DataConfig(32, root=str(data), batch_size=250, limit=arguments.images)
    tokenize(load_tokenizer(codec), seen, out / "tokens", augmentation="flip")
    config, tokens = recipes / "token_shuffle.yaml", f"tokens={out / 'tokens'}"
    single = train_for(config, arguments.generator_minutes, out / "single", [tokens, "model.window=1"])
    steps = load_config(single / "config.yaml")["training"]["max_steps"]
    windows = train_steps(config, steps, out / "windows", [tokens, "model.window=2"])
    classifier = load_instrument(instrument).load()
    return pipeline(single), pipeline(windows), lambda pixels: classifier(pixels).argmax(1)


def compare(
    single: Pipeline, windows: Pipeline, recognise: Recognise, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Calls, seconds and the share recognised for every decoding."""
    jacobi = SJD | {"window": arguments.window}
    ways = {
        PLAIN: (single, {}),
        "sjd": (single, jacobi),
        "sjd_coupled": (single, jacobi | {"coupled": True}),
        "token_shuffle_2": (windows, {}),
    }
    measured = {way: quality(pipe, options, recognise, arguments.num) for way, (pipe, options) in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(arguments.alone + 1):
        for way, (pipe, options) in ways.items():
            begin = time.perf_counter()
            for _ in start(pipe, options, Keys.range(1, 1, index), torch.tensor([index % CLASSES])).generate():
                pass
            seconds[way].append(time.perf_counter() - begin)
    for way, taken in seconds.items():
        measured[way]["seconds"] = sum(taken[1:]) / arguments.alone  # the first call also packs weights
    return measured


@torch.no_grad()
def quality(pipe: Pipeline, options: dict[str, Any], recognise: Recognise, num: int) -> dict[str, float]:
    """Calls per image and the share recognised, of ``num`` images whose classes alternate."""
    keys, wanted = Keys.range(0, num), torch.arange(num) % CLASSES
    session, calls = start(pipe, options, keys, wanted), torch.zeros(num)
    for chunk in session.generate():
        calls += chunk.valid.any(1)
    pixels = torch.cat([pipe.decode(part, keys) for part in session.tokens.split(250)])
    recognised = torch.cat([recognise(part) for part in pixels.split(250)]) == wanted
    return {"calls": calls.mean().item(), "recognised": recognised.float().mean().item()}


def start(pipe: Pipeline, options: dict[str, Any], keys: Keys, classes: Tensor) -> Session:
    """A session with an image for each of ``classes``; the condition is a text if the generator takes texts."""
    if pipe.text.parts:
        condition = pipe.text.condition([f"a {NUMBERS[label]}" for label in classes.tolist()])
    else:
        condition = Condition.from_labels(classes)
    chosen = pipe.options(**options)
    return pipe.generator.start(condition, chosen, draws=pipe.generator.sampling_draws(keys, chosen))


if __name__ == "__main__":
    main()
