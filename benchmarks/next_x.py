"""Next-X prediction with five X (xAR, arXiv 2502.20388) at equal training, on scikit-learn's digits.

    python benchmarks/next_x.py --threads 2

One tokenizer (the quickstart's KL autoencoder, 4x4 latents) feeds five generators of the same size, data and number of
steps, which differ in ``model.layout`` alone: a token, a 2x2 cell, a subsample of tokens two apart, the whole image,
and scales of 1x1, 2x2 and 4x4. Reported for each: the training loss (mean over the last tenth of the steps; for scales
it includes coarse latents, which are easier), the share of samples that a classifier of real digits recognises as the
class asked for, the Frechet distance on its features to the training digits, seconds per image, and network calls per
image. The scores are named after the classifier; they are not FID. The training is short: it shows which X is learnt
fastest at this size, not which is best.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import finish, say, use_threads

LAYOUTS = {
    "token": "{entity: token}",
    "cell": "{entity: cell, size: 2}",
    "subsample": "{entity: subsample, size: 2}",
    "image": "{entity: image}",
    "scale": "{entity: scale, scales: [1, 2, 4]}",
}
VIEWS = 32
QUIET = ["training.image_every=0", "training.save_every=0", "training.log_every=10"]
SHORT = [*QUIET, "training.batch_size=64", "training.ema_decay=0.99"]  # smaller batches than the quickstart's


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    from vistok.quickstart.scores import fit_classifier, load_digits

    out = Path(arguments.out or tempfile.mkdtemp(prefix="vistok-next-x-"))
    tokens = tokenize(tokenizer_run(arguments, out), out / "tokens")
    real = load_digits("train")
    classifier = fit_classifier(real, steps=600)
    figures = {"steps": arguments.steps, "samples": arguments.num, "threads": arguments.threads}
    for name, layout in LAYOUTS.items():
        changes = [*SHORT, f"model.layout={layout}", f"training.max_steps={arguments.steps}", *arguments.changes]
        run = train_generator([*changes, f"tokens={tokens}", f"output_dir={out / name}"])
        row = {"loss": final_loss(run), **score(run, arguments.num, classifier, real)}
        figures |= {f"{name}_{key}": value for key, value in row.items()}
        say(f"{name:9} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    say(f"everything is in {out}")
    print(table(figures))
    calls = {name: figures[f"{name}_calls"] for name in LAYOUTS}
    finish("next_x", {"calls_token_over_cell": calls["token"] / calls["cell"]}, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps of each generator")
    parser.add_argument("--tokenizer-steps", type=int, default=300)
    parser.add_argument("--tokenizer-run", help="a run of the quickstart's tokenizer, instead of training one")
    parser.add_argument("--changes", nargs="*", default=[], help="key=value, to the config of all five generators")
    parser.add_argument("--num", type=int, default=500, help="samples that are scored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="folder for the runs; a temporary one by default")
    return parser.parse_args()


def tokenizer_run(arguments: argparse.Namespace, out: Path) -> Path:
    from vistok.config import load_config
    from vistok.quickstart.systems import config_file
    from vistok.train import train

    if arguments.tokenizer_run:
        return Path(arguments.tokenizer_run)
    changes = [f"output_dir={out / 'tokenizer'}", f"training.max_steps={arguments.tokenizer_steps}", *QUIET]
    return train(load_config(config_file("xar", "tokenizer"), changes))


def tokenize(run: Path, out: Path) -> Path:
    """The token cache of the digits in a few augmented views."""
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.runs import data_of_run
    from vistok.train.tokenize import tokenize

    tokenizer = load_tokenizer(run)
    data = data_of_run(run, (), input_shape=tokenizer.input_shape)
    tokenize(tokenizer, data, out, augmentation=f"random:{VIEWS}")
    return out


def train_generator(changes: list[str]) -> Path:
    from vistok.config import load_config
    from vistok.quickstart.systems import config_file
    from vistok.train import train

    return train(load_config(config_file("xar", "generator"), changes))


def final_loss(run: Path) -> float:
    from vistok.train.monitor import read_metrics

    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    return statistics.fmean(losses[-max(len(losses) // 10, 1) :])


def score(run: Path, count: int, classifier, real) -> dict[str, float]:
    """Scores of class-balanced samples of a run by the classifier, with their time and network calls."""
    import torch

    from vistok.eval.metrics import frechet_distance
    from vistok.pipelines import pipeline
    from vistok.quickstart.scores import CLASSES, Digits

    pipe, calls = pipeline(run), 0

    def count_call(*_) -> None:
        nonlocal calls
        calls += 1

    pipe.generator.input.register_forward_hook(count_call)  # the hook runs once per call of the network
    begin = time.perf_counter()
    made = pipe(list(range(CLASSES)), count // CLASSES, batch_size=count)
    seconds = time.perf_counter() - begin
    digits = Digits(made.pixels, torch.tensor(made.labels))
    moments = [classifier.moments(part).gaussian for part in (digits, real)]
    return {
        "recognised": classifier.accuracy(digits),
        "frechet_digit_classifier": frechet_distance(*moments),
        "s_per_image": seconds / len(digits),
        "calls": calls,
    }


def table(figures: dict[str, float]) -> str:
    """All rows as Markdown."""
    columns = ("loss", "recognised", "frechet_digit_classifier", "s_per_image", "calls")
    rows = [f"| X | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in LAYOUTS:
        values = (f"{figures[f'{name}_{column}']:.3g}" for column in columns)
        rows.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
