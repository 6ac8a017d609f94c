"""Four training objectives of a next-token generator at equal compute.

The objectives are plain training, a mixture of predictions that anneals to the plain one (arXiv 2405.16847), scheduled
sampling, and token noise, on the tokens of one tokenizer: of scikit-learn's digits, and of CIFAR-10 if a tokenizer's
run on it is given. Each is scored by the held-out loss of the next token in nats, by the share of samples that a
classifier recognises, and by the Frechet distance on its features. A step of scheduled sampling has one more pass, so
it gets 3/4 as many steps.

    python benchmarks/objectives.py --out objectives/
    python benchmarks/objectives.py --digits quickstart/tokenizer --out objectives/
    python benchmarks/objectives.py --cifar runs/cifar10-llamagen-vq --out objectives/

The digits' tokenizer is trained first unless ``--digits`` names one. ``--cifar-set`` overrides the config of CIFAR-10's
generator, for a smaller machine. Runs that were stopped are resumed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RECIPES, ROOT, digit_scorer, find, finish, load_instrument, say

ANNEALED = {"next": [0.4, 1.0], "next_all": [0.4, 0.0], "random": [0.2, 0.0]}
OBJECTIVES: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1.0),
    "mixture": (ANNEALED, 1.0),
    "scheduled_sampling": ({"scheduled_sampling": {"share": 0.25}}, 0.75),
    "token_noise": ({"token_noise": 0.1}, 1.0),
}
"""By name: the changes to the config, and the number of steps as a factor of the plain one's."""
MEASURES = ("val_loss", "recognised", "frechet")
Scores = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--digits", type=Path, help="run of a tokenizer of 32 px digits")
    parser.add_argument("--cifar", type=Path, help="run of a tokenizer of CIFAR-10; without it only digits are tried")
    parser.add_argument("--data", help="CIFAR-10 as a .zip or folder")
    parser.add_argument("--instrument", help="module of the classifier of 32 px samples")
    parser.add_argument("--tokenizer-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600, help="of a plain generator of digits")
    parser.add_argument("--cifar-steps", type=int, default=600, help="of a plain generator of CIFAR-10")
    parser.add_argument("--cifar-images", type=int, help="training images, and a fifth as many held out")
    parser.add_argument("--cifar-set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to cifar10/llama")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    kinds = (("digits", digits, arguments.steps), ("cifar10", cifar10, arguments.cifar_steps))
    for name, prepare, steps in kinds:
        if name == "cifar10" and arguments.cifar is None:
            continue
        config, score = prepare(arguments)
        rows = [
            {"objective": objective, "seed": seed}
            | measure(config, objective, seed, steps, arguments.out / f"{name}-{objective}-{seed}", score)
            for seed in range(arguments.seeds)
            for objective in OBJECTIVES
        ]
        print(f"\n| {name} | " + " | ".join(MEASURES) + " |\n" + "|---" * (1 + len(MEASURES)) + "|")
        for objective in OBJECTIVES:
            own = [row for row in rows if row["objective"] == objective]
            print(f"| {objective} | " + " | ".join(" / ".join(f"{r[m]:.4g}" for r in own) for m in MEASURES) + " |")
            for measured in MEASURES:
                figures[f"{name}_{measured}_{objective}"] = statistics.mean(row[measured] for row in own)
            loss = figures[f"{name}_val_loss_{objective}"]
            ratios[f"{name}_val_loss_{objective}_over_plain"] = loss / figures[f"{name}_val_loss_plain"]
    names = ("tokenizer_steps", "steps", "cifar_steps", "samples", "seeds")
    finish("objectives", ratios, figures | {name: getattr(arguments, name) for name in names})


def measure(
    config: dict[str, Any],
    objective: str,
    seed: int,
    plain_steps: int,
    folder: Path,
    score: Callable[[Any], Scores],
) -> Scores:
    """Train one generator, or resume its training, and score it."""
    from vistok.pipelines import pipeline
    from vistok.train import train
    from vistok.train.monitor import read_metrics

    section, share = OBJECTIVES[objective]
    steps = round(plain_steps * share)
    rhythm = {"max_steps": steps, "log_every": max(steps // 10, 1), "image_every": 0, "save_every": steps}
    run = train(
        config
        | {"seed": seed, "output_dir": str(folder), "objective": section}
        | {"training": config["training"] | rhythm},
        resume=folder.exists(),
    )
    rows = read_metrics(Path(run) / "metrics.jsonl")
    scores = {"val_loss": next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)}
    scores |= score(pipeline(run))
    say(f"{folder.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return scores


def generator_config(file: Path, tokens: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    from vistok.config import load_config

    config = load_config(file, [f"tokens={tokens / 'train'}", *changes])
    return config | {"validation": {"tokens": str(tokens / "test")}, "curve": None}


def write_tokens(run: Path, folder: Path, augmentation: str, data: list[str], limit: int | None = None) -> None:
    """Write missing token caches of both splits: of all images, or of ``limit`` and a fifth as many held out."""
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.runs import data_of_run
    from vistok.train.tokenize import tokenize
    from vistok.utils.outputs import unfinished

    tokenizer = load_tokenizer(run)
    for split, views, share in (("train", augmentation, 1), ("test", "none", 5)):
        out = folder / split
        if not out.exists():
            count = [] if limit is None else [f"data.limit={limit // share}"]
            config = data_of_run(run, [f"data.split={split}", *data, *count], input_shape=tokenizer.input_shape)
            tokenize(tokenizer, config, out, augmentation=views, resume=unfinished(out).exists())


def digits(arguments: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Any], Scores]]:
    """The config of a generator of digits, and a function that scores its pipeline."""
    from vistok.config import load_config
    from vistok.train import train

    recipe = ROOT / "vistok" / "tokenizers" / "vit_vqgan" / "quickstart"
    run = arguments.digits
    if run is None:
        run = arguments.out / "digits-tokenizer"
        steps = [f"training.max_steps={arguments.tokenizer_steps}", f"output_dir={run}"]
        train(load_config(recipe / "tokenizer.yaml", steps), resume=run.exists())
    tokens = arguments.out / "digits-tokens"
    write_tokens(run, tokens, "random:16", [])
    score_digits = digit_scorer()

    def score(pipe: Any) -> Scores:
        return score_digits(pipe(list(range(10)), num_images_per_label=arguments.samples // 10, batch_size=250))

    return generator_config(recipe / "generator.yaml", tokens), score


def cifar10(arguments: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Any], Scores]]:
    """The config of a generator of CIFAR-10, and a function that scores its pipeline."""
    import cifar10 as shared

    data = find(arguments.data, "data/cifar10.zip", "--data")
    instrument = load_instrument(find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument"))
    tokens = arguments.out / "cifar10-tokens"
    write_tokens(arguments.cifar, tokens, "flip", [f"data.root={data}"], arguments.cifar_images)
    real = shared.real_features(instrument, data)
    changes = ["model.positions=learned", *arguments.cifar_set]  # works for tokens on a raster or not
    config = generator_config(RECIPES / "cifar10" / "llama.yaml", tokens, changes)

    def score(pipe: Any) -> Scores:
        found = shared.score_pipeline(instrument, pipe, real, arguments.samples)
        return {"recognised": found["agreement"], "frechet": found["frechet_cifar10_classifier"]}

    return config, score


if __name__ == "__main__":
    main()
