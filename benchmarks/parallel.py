"""Sequential and parallel generators of every kind at equal training, in one table.

    python benchmarks/parallel.py digits --seconds 75 --out runs/parallel
    python benchmarks/parallel.py cifar10 --tokenizer-seconds 120 --seconds 90 --num 1000 --out runs/parallel

Llama (plain, and with Jacobi decoding), Token-Shuffle, RandAR and LPD learn the ids of one tokenizer; VAR learns those
of its multi-scale tokenizer; MAR and xAR learn the latents of a KL autoencoder. Each generator trains for the same
core-seconds, without the time of tokenizing; a trial gives the number of steps. All have the size and the batch of
their configs for CIFAR-10, smaller ones on digits, and are sampled as their configs say.

Reported: network calls (passes through all blocks of the transformer) and seconds of an image that is sampled alone,
the mean over ten; seconds per image in batches; the share of samples that a classifier recognises as the class asked
for, and the Frechet distance on its features. The classifier is fitted to real digits in the run, or is the fixed one
for CIFAR-10; the distance is not FID. MAR's small head runs more often than its transformer: ``num_steps`` times per
call.

Tokenizers and generators that exist in the folder are not trained again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RECIPES, digit_scorer, find, finish, load_instrument, say, use_threads

CLASSES = 10
TRIALS = (5, 25)
"""Numbers of steps of two trials; their difference in time gives the cost of a step."""
QUIET = ("training.image_every=0", "training.save_every=0", "training.log_every=50", "curve=null")
COLUMNS = ("steps", "core_seconds", "calls", "s_alone", "s_per_image", "recognised", "frechet")
Scores = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        config: the generator's config, cifar10/NAME.
        tokenizer: the tokenizer whose tokens the generator models.
        digits: overrides of the config for digits, which have 4x4 tokens.
        sampling: sampling options in addition to those of the config.
    """

    config: str
    tokenizer: str = "vq"
    digits: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


TWICE_TWO = ("model.num_encoder_layers=2", "model.num_decoder_layers=2")
ROWS = {
    "Llama": Row("llama", digits=("model.num_layers=4",)),
    "Llama, SJD": Row("llama", digits=("model.num_layers=4",), sampling={"decoding": "jacobi"}),
    "Token-Shuffle": Row("token_shuffle", digits=("model.num_layers=4",)),
    "RandAR": Row("randar", digits=("model.num_layers=4", "sampling.num_steps=8")),
    "LPD": Row("lpd", digits=("model.num_layers=4", "sampling.num_steps=5")),
    "VAR": Row("var", "var", ("model.num_layers=4",)),
    "MAR": Row("mar", "kl", (*TWICE_TWO, "model.head_dim=128", "sampling.num_iter=8")),
    "xAR": Row("xar", "kl", (*TWICE_TWO, "model.layout.size=2")),
}
TOKENIZERS = {"vq": ("randar", "llamagen_vq"), "var": ("var", "var_vq"), "kl": ("xar", "kl_vae")}
"""By a tokenizer's name: the system whose quickstart trains it on digits, and the config for CIFAR-10."""
SMALL = ("model.dim=128", "optimizer.lr=1e-3", "lr_scheduler.warmup_steps=50", "training.mixed_precision=no")
SMALL_AVERAGE = "training.ema_decay=0.995"


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    out = arguments.out / arguments.data
    prepare = digits if arguments.data == "digits" else cifar10
    tokens, changes, score = prepare(arguments, out)
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("data", "seconds", "num", "threads")}
    rows = {}
    for name, row in ROWS.items():
        if row.config not in arguments.only:
            continue
        own = row.digits if arguments.data == "digits" else ()
        run, trained = train_for(row, [*changes, *own, f"tokens={tokens[row.tokenizer]}"], arguments.seconds, out)
        rows[name] = trained | measure(run, row.sampling, arguments, score)
        figures |= {f"{name}_{key}": value for key, value in rows[name].items()}
        say(f"{name:14} " + ", ".join(f"{key} {value:.4g}" for key, value in rows[name].items()))
    print(table(rows))
    ratios = {f"calls_Llama_over_{name}": rows["Llama"]["calls"] / row["calls"] for name, row in rows.items()}
    finish("parallel", ratios, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "cifar10"))
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seconds", type=float, default=75, help="core-seconds that each generator trains for")
    parser.add_argument("--tokenizer-seconds", type=float, default=120, help="of each tokenizer of CIFAR-10")
    parser.add_argument("--num", type=int, default=500, help="samples that are scored")
    parser.add_argument("--batch-size", type=int, default=250, help="samples made at once; xAR needs most memory")
    parser.add_argument("--only", nargs="*", default=[row.config for row in ROWS.values()], help="configs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--root", help="CIFAR-10 as a .zip or folder in ImageFolder layout")
    parser.add_argument("--instrument", help="module of the classifier of 32 px samples")
    arguments = parser.parse_args()
    if "llama" not in arguments.only:
        parser.error("--only must name llama, which the others are compared with")
    return arguments


def needed(arguments: argparse.Namespace) -> list[str]:
    return sorted({row.tokenizer for row in ROWS.values() if row.config in arguments.only})


def digits(arguments: argparse.Namespace, out: Path) -> tuple[dict[str, Path], list[str], Callable[[Any], Scores]]:
    """Token caches by tokenizer, overrides of the configs, and a function that scores samples."""
    from vistok.config import load_config
    from vistok.quickstart.systems import config_file
    from vistok.train import train

    tokens = {}
    for name in needed(arguments):
        run = out / f"tokenizer-{name}"
        if not run.exists():
            say(f"tokenizer {name}, as in quickstart --system {TOKENIZERS[name][0]}")
            train(load_config(config_file(TOKENIZERS[name][0], "tokenizer"), [f"output_dir={run}", *QUIET]))
        tokens[name] = write_tokens(run, out / f"tokens-{name}", "random:32")
    return tokens, [*SMALL, SMALL_AVERAGE], digit_scorer()


def cifar10(arguments: argparse.Namespace, out: Path) -> tuple[dict[str, Path], list[str], Callable[[Any], Scores]]:
    """As ``digits``, for CIFAR-10."""
    import cifar10 as shared
    import torch

    root = find(arguments.root, "data/cifar10.zip", "--root")
    instrument = load_instrument(find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument"))
    tokens = {}
    for name in needed(arguments):
        run, config, changes = out / f"tokenizer-{name}", TOKENIZERS[name][1], [f"data.root={root}"]
        if not run.exists():
            train_steps(config, changes, steps_in(config, changes, arguments.tokenizer_seconds), run)
        say(f"{config}: {shared.test_psnr(load(run), root, 1000):.2f} dB on 1,000 test images")
        tokens[name] = write_tokens(run, out / f"tokens-{name}", "flip")
    real, classifier = shared.real_features(instrument, root), instrument.load()

    @torch.no_grad()
    def score(made: Any) -> Scores:
        parts = made.pixels.split(500)
        right = torch.cat([classifier(part).argmax(1) for part in parts]) == torch.tensor(made.labels)
        features = torch.cat([classifier.features(part) for part in parts])
        distance = instrument.frechet_distance(features, real)
        return {"recognised": right.float().mean().item(), "frechet": distance}

    return tokens, [], score


def load(run: Path) -> Any:
    from vistok.pipelines.folders import load_tokenizer

    return load_tokenizer(run).eval()


def write_tokens(run: Path, out: Path, views: str) -> Path:
    """Write the token cache of a tokenizer's training images; returns its folder."""
    from vistok.pipelines.runs import data_of_run
    from vistok.train.tokenize import tokenize

    if not out.exists():
        tokenizer = load(run)
        tokenize(tokenizer, data_of_run(run, (), input_shape=tokenizer.input_shape), out, augmentation=views)
    return out


def train_for(row: Row, changes: list[str], seconds: float, out: Path) -> tuple[Path, Scores]:
    """Train a generator for ``seconds`` core-seconds; returns its run, and its steps and core-seconds by name."""
    from vistok.config import load_config

    run = out / row.config
    if not (run / "core_seconds.txt").exists():
        shutil.rmtree(run, ignore_errors=True)  # an interrupted run starts again
        steps = steps_in(row.config, changes, seconds)
        used = train_steps(row.config, changes, steps, run)
        (run / "core_seconds.txt").write_text(str(used))
    steps = load_config(run / "config.yaml")["training"]["max_steps"]
    return run, {"steps": steps, "core_seconds": float((run / "core_seconds.txt").read_text())}


def steps_in(config: str, changes: list[str], seconds: float) -> int:
    """The number of steps that take ``seconds`` core-seconds."""
    with tempfile.TemporaryDirectory(prefix="vistok-trial-") as folder:
        costs = [train_steps(config, changes, steps, Path(folder) / str(steps)) for steps in TRIALS]
    return max(int(seconds * (TRIALS[1] - TRIALS[0]) / (costs[1] - costs[0])), 1)


def train_steps(config: str, changes: list[str], steps: int, run: Path) -> float:
    """Train; returns the core-seconds of the training."""
    from vistok.config import load_config
    from vistok.train import train

    own = [*QUIET, f"output_dir={run}", f"training.max_steps={steps}"]
    begin = time.process_time()
    train(load_config(RECIPES / "cifar10" / f"{config}.yaml", [*changes, *own]))
    return time.process_time() - begin


def measure(
    run: Path, sampling: dict[str, Any], arguments: argparse.Namespace, score: Callable[[Any], Scores]
) -> Scores:
    """Sample ten images alone, and all scored images in batches."""
    from vistok.pipelines import pipeline

    pipe = pipeline(run)
    calls, alone = CallCounter(pipe.generator), 0.0
    with calls:
        for label in range(CLASSES):
            begin = time.perf_counter()
            pipe([label], **sampling)
            alone += time.perf_counter() - begin
    begin = time.perf_counter()
    made = pipe(list(range(CLASSES)), arguments.num // CLASSES, batch_size=arguments.batch_size, **sampling)
    seconds = time.perf_counter() - begin
    figures = {"calls": calls.count / CLASSES, "s_alone": alone / CLASSES, "s_per_image": seconds / len(made.labels)}
    return figures | score(made)


class CallCounter:
    """A context that counts passes through all blocks of a generator's transformer, or of a copy of it."""

    def __init__(self, generator: Any):
        lists = [getattr(generator, name, ()) for name in ("blocks", "encoder_blocks", "decoder_blocks")]
        blocks = [block for blocks in lists for block in blocks]
        self._kind, self._blocks, self._seen = type(blocks[0]), len(blocks), 0

    @property
    def count(self) -> float:
        return self._seen / self._blocks

    def __enter__(self) -> CallCounter:
        from torch.nn.modules.module import register_module_forward_hook

        def note(module: Any, *_: Any) -> None:
            self._seen += type(module) is self._kind

        self._hook = register_module_forward_hook(note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


def table(rows: dict[str, Scores]) -> str:
    """All rows as Markdown."""
    lines = [f"| generator | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.3g}" for key in COLUMNS) + " |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
