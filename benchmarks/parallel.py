"""One token after another, or many at once: decodings side by side, trained for equal time, on digits and CIFAR-10.

    python benchmarks/parallel.py --threads 1 --out parallel/
    python benchmarks/parallel.py --threads 1 --out parallel-cifar10/ --data ../shared/data/cifar10.zip

Generators that read ids learn the tokens of one tokenizer; VAR has its own, of several scales, and MAR and xAR the
latents of a KL autoencoder. Each is trained for ``--seconds``, which its first steps turn into a number of steps; SJD
is another decoding of the plain Llama. Reported for each, as seen: steps, network calls of a sample, seconds per
image in batches of ``--num``, the share of samples that a classifier of real images takes for the class asked for, and
the Frechet distance on its features to training images. Those scores carry the classifier's name; they are not FID. The
training is short: it says what is learnt fast at this size, not what is best.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, find, finish, load_instrument, say, use_threads

TRIAL = 10
COLUMNS = ("steps", "calls", "s_per_image", "recognised", "frechet")
RASTER, SCALES, LATENTS = "raster", "scales", "latents"


@dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
        tokens: which tokenizer's it learns.
        config: of the generator.
        network: the method that is one call of its network.
        like: the row whose run it samples from; None trains one of its own.
        sampling: options.
    """

    tokens: str
    config: str
    network: str = "transform"
    like: str | None = None
    sampling: str = "{}"


ENTRIES = {
    "llama": Entry(RASTER, "llama"),
    "sjd": Entry(RASTER, "llama", like="llama", sampling="{decoding: jacobi}"),
    "token_shuffle": Entry(RASTER, "token_shuffle"),
    "randar": Entry(RASTER, "randar"),
    "lpd": Entry(RASTER, "lpd"),
    "var": Entry(SCALES, "var"),
    "mar": Entry(LATENTS, "mar", network="encode"),
    "xar": Entry(LATENTS, "xar"),
}
TOKENIZERS = {RASTER: "llamagen_vq", SCALES: "var_vq", LATENTS: "kl_vae"}
# At the size of digits: 4x4 tokens, or scales of 1 to 4; generators of the quickstart's size.
DIGITS = {RASTER: "vit_vqgan", SCALES: "var", LATENTS: "xar"}
SMALL = ["model.dim=128", "model.num_heads=4", "optimizer.lr=1e-3", "lr_scheduler.warmup_steps=20"]
LAYERS = {"mar": ["model.num_encoder_layers=2", "model.num_decoder_layers=2", "model.head_dim=128"]}
LAYERS["xar"] = ["model.num_encoder_layers=2", "model.num_decoder_layers=2", "model.layout={entity: cell, size: 2}"]
STEPS_OF_DIGITS = {"randar": "{num_steps: 8}", "lpd": "{num_steps: 6}"}


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    judge = Digits() if arguments.data is None else Cifar(arguments)
    out, rows, runs = arguments.out, {}, {}
    tokens = {
        kind: judge.tokens(kind, arguments, out / kind) for kind in dict.fromkeys(e.tokens for e in ENTRIES.values())
    }
    for name, entry in ENTRIES.items():
        if entry.like is None:
            changes = [f"tokens={tokens[entry.tokens]}", *judge.changes(name)]
            runs[name] = train_for(
                ROOT / "configs" / "cifar10" / f"{entry.config}.yaml", arguments.seconds, out / name, changes
            )
        run, steps = runs[entry.like or name]
        rows[name] = {"steps": steps, **score(run, entry, judge.sampling(name), arguments.num, judge)}
        say(f"{name:14} " + ", ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    print(table(rows))
    figures: dict[str, Any] = {"seconds": arguments.seconds, "samples": arguments.num, "threads": arguments.threads}
    figures |= {f"{name}_{key}": value for name, row in rows.items() for key, value in row.items()}
    calls = rows["llama"]["calls"]
    finish("parallel", {f"calls_llama_over_{name}": calls / row["calls"] for name, row in rows.items()}, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs, which must not exist")
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each generator")
    parser.add_argument("--tokenizer-seconds", type=float, default=60, help="of training, for each tokenizer")
    parser.add_argument("--num", type=int, default=200, help="samples that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", help="CIFAR-10 as a .zip or folder in ImageFolder layout; digits without it")
    parser.add_argument("--instrument", help="the module of CIFAR-10's classifier")
    return parser.parse_args()


class Digits:
    """scikit-learn's digits, judged by the quickstart's classifier."""

    def __init__(self) -> None:
        from vistok.quickstart.scores import fit_classifier, load_digits

        self.real = load_digits("train")
        self.classifier = fit_classifier(self.real, steps=600)

    def tokens(self, kind: str, arguments: argparse.Namespace, out: Path) -> Path:
        from vistok.quickstart.systems import config_file

        run, _ = train_for(config_file(DIGITS[kind], "tokenizer"), arguments.tokenizer_seconds, out / "run", [])
        return tokenized(run, [], out / "tokens", "random:8")

    def changes(self, name: str) -> list[str]:
        return [*SMALL, *LAYERS.get(name, ["model.num_layers=4"])]

    def sampling(self, name: str) -> str:
        return STEPS_OF_DIGITS.get(name, ENTRIES[name].sampling)

    def scores(self, pixels, labels) -> dict[str, float]:
        from vistok.eval.metrics import frechet_distance
        from vistok.quickstart.scores import Digits as Images

        made = Images(pixels, labels)
        moments = [self.classifier.moments(part).gaussian for part in (made, self.real)]
        return {"recognised": self.classifier.accuracy(made), "frechet": frechet_distance(*moments)}


class Cifar:
    """CIFAR-10, judged by a fixed classifier."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from cifar10 import images

        path = find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument")
        self.instrument, self.data = load_instrument(path), Path(arguments.data)
        self.classifier = self.instrument.load()
        self.real = self._features(images(self.data, "train", 5000)[0])

    def tokens(self, kind: str, arguments: argparse.Namespace, out: Path) -> Path:
        config, root = ROOT / "configs" / "cifar10" / f"{TOKENIZERS[kind]}.yaml", [f"data.root={self.data}"]
        run, _ = train_for(config, arguments.tokenizer_seconds, out / "run", root)
        return tokenized(run, [*root, "data.limit=10000"], out / "tokens", "none")

    def changes(self, name: str) -> list[str]:
        return ["lr_scheduler.warmup_steps=20"]

    def sampling(self, name: str) -> str:
        return ENTRIES[name].sampling

    def _features(self, pixels):
        import torch

        with torch.no_grad():
            return torch.cat([self.classifier.features(part) for part in pixels.split(250)])

    def scores(self, pixels, labels) -> dict[str, float]:
        features = self._features(pixels)
        right = self.classifier.head(features).argmax(1) == labels
        return {
            "recognised": right.float().mean().item(),
            "frechet": self.instrument.frechet_distance(features, self.real),
        }


def train_for(config: Path, seconds: float, out: Path, changes: list[str]) -> tuple[Path, int]:
    """A run of about so many seconds of training, which a trial turns into steps; and these."""
    from vistok.train.monitor import read_metrics

    trial = train_steps(config, TRIAL, out.with_name(f"{out.name}-trial"), changes)
    rows = {row["step"]: row["seconds"] for row in read_metrics(trial / "metrics.jsonl")}
    first = TRIAL // 2  # the first steps warm up
    steps = max(round(seconds * (TRIAL - first) / (rows[TRIAL] - rows[first])), TRIAL)
    return train_steps(config, steps, out, changes), steps


def train_steps(config: Path, steps: int, out: Path, changes: list[str]) -> Path:
    from vistok.config import load_config
    from vistok.train import train

    every = ["training.image_every=0", "training.save_every=0", f"training.log_every={max(steps // 10, 1)}"]
    length = [f"output_dir={out}", f"training.max_steps={steps}", "training.ema_decay=0.98"]
    return train(load_config(config, [*changes, *every, *length]))


def tokenized(run: Path, changes: list[str], out: Path, augmentation: str) -> Path:
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.runs import data_of_run
    from vistok.train.tokenize import tokenize

    tokenizer = load_tokenizer(run)
    tokenize(tokenizer, data_of_run(run, changes, input_shape=tokenizer.input_shape), out, augmentation=augmentation)
    return out


def score(run: Path, entry: Entry, sampling: str, count: int, judge: Digits | Cifar) -> dict[str, float]:
    """Class-balanced samples of a run in one batch, with the time and the network calls that they took."""
    import torch
    import yaml

    from vistok.pipelines import pipeline

    pipe, calls = pipeline(run), 0
    kind = type(pipe.generator)
    network = getattr(kind, entry.network)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return network(*args, **kwargs)

    setattr(kind, entry.network, counted)  # of the class: steps are computed by copies of the model
    try:
        begin = time.perf_counter()
        made = pipe(list(range(10)), count // 10, batch_size=count, **yaml.safe_load(sampling))
        seconds = time.perf_counter() - begin
    finally:
        setattr(kind, entry.network, network)
    scores = judge.scores(made.pixels, torch.tensor(made.labels))
    return {"calls": calls, "s_per_image": seconds / len(made.pixels), **scores}


def table(rows: dict[str, dict[str, float]]) -> str:
    """All rows as Markdown."""
    lines = [f"| generator | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[column]:.3g}' for column in COLUMNS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
