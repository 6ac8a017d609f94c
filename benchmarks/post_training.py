"""What do perturbed latents and post-training (RobusTok, arXiv 2509.12474) bring? One tokenizer of CIFAR-10, with and
without perturbation, before and after post-training.

    python benchmarks/post_training.py --threads 1 --out post_training/

For each seed, with and without perturbation, a tokenizer and a generator on its tokens are trained, pairs are made of
training images (sigma 0.7), and the decoder is trained on them. Reported before and after, as seen, on features of a
fixed CIFAR-10 classifier, whose name the distances carry; they are neither rFID, pFID nor FID:

- rec: of reconstructions from the test images;
- perturbed: of reconstructions from perturbed tokens (pFID's protocol; its grid is in the closing line), from the same;
- samples: of generated images from training images; both decoders get the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import ROOT, find, finish, load_instrument, say, use_threads

TOKENIZER, GENERATOR, POST = (
    ROOT / "configs" / "cifar10" / f"{n}.yaml" for n in ("llamagen_vq", "llama", "post_training")
)
PERTURBATION = "{rate: 1.0, share: 0.1, strength: 50}"
SIGMA, RATES, STRENGTHS = 0.7, (0.5, 0.9), (50, 100)
SCORES = ("rec", "perturbed", "samples")


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    data = find(arguments.data, "data/cifar10.zip", "--data")
    instrument = load_instrument(find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument"))
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name, perturbation in (("plain", "null"), ("perturbed", PERTURBATION)):
            found = measure(arguments, data, instrument, seed, perturbation, arguments.out / f"{name}-{seed}")
            for when, scores in found.items():
                rows.setdefault(f"{name}_{when}", []).append(scores)
                say(f"seed {seed} {name:9} {when:6} " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    print(table(rows))
    figures: dict[str, Any] = {
        "rates": str(RATES),
        "strengths": str(STRENGTHS),
        "sigma": SIGMA,
        "seeds": arguments.seeds,
    }
    figures |= {key: getattr(arguments, key) for key in ("tokenizer_steps", "generator_steps", "post_steps", "pairs")}
    means = {
        f"{row}_{key}": statistics.fmean(s[key] for s in several) for row, several in rows.items() for key in SCORES
    }
    ratios = {
        f"{name}_{key}_after_over_before": means[f"{name}_after_{key}"] / means[f"{name}_before_{key}"]
        for name in ("plain", "perturbed")
        for key in SCORES
    }
    finish("post_training", ratios, figures | means)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs, which must not exist")
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument("--generator-steps", type=int, default=300)
    parser.add_argument("--post-steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=5000, help="training images whose tokens the generator learns")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--num", type=int, default=1000, help="test images and samples that are scored")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", help="CIFAR-10 as a .zip or folder in ImageFolder layout")
    parser.add_argument("--instrument", help="the classifier's module")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace, data: Path, instrument, seed: int, perturbation: str, out: Path
) -> dict[str, dict[str, float]]:
    """The scores of one tokenizer before and after post-training."""
    from vistok.data import DataConfig
    from vistok.pipelines import Pipeline, pipeline
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.pairs import write_pairs
    from vistok.train.tokenize import tokenize

    root = [f"data.root={data}", f"perturbation={perturbation}"]
    first = trained(TOKENIZER, out / "tokenizer", seed, arguments.tokenizer_steps, root)
    images = DataConfig(32, root=str(data), limit=arguments.images)
    tokenize(load_tokenizer(first), images, out / "tokens")
    generator = trained(GENERATOR, out / "generator", seed, arguments.generator_steps, [f"tokens={out / 'tokens'}"])
    pipe = pipeline(generator)
    pairs = DataConfig(32, root=str(data), limit=arguments.pairs)
    write_pairs(pipe, pairs, out / "pairs", sigma=SIGMA, seed=seed, batch_size=250)
    sides = [f"data.root={out / 'pairs' / 'generated'}", f"data.target_root={out / 'pairs' / 'real'}"]
    post = trained(POST, out / "post", seed, arguments.post_steps, [*sides, f"init_from={first}"])
    after = Pipeline(load_tokenizer(post), pipe.generator, class_names=pipe.class_names, sampling=pipe.sampling)
    both = {"before": pipe, "after": after}
    return {when: score(each, instrument, data, arguments.num, seed) for when, each in both.items()}


def trained(config: Path, out: Path, seed: int, steps: int, changes: list[str]) -> Path:
    from vistok.config import load_config
    from vistok.train import train

    every = max(steps // 10, 1)
    rhythm = [
        f"training.max_steps={steps}",
        f"training.log_every={every}",
        "training.image_every=0",
        "training.save_every=0",
    ]
    short = ["training.ema_decay=0.98", "lr_scheduler.warmup_steps=20"]  # these runs are short
    return train(load_config(config, [*rhythm, *short, *changes, f"seed={seed}", f"output_dir={out}"]))


def score(pipe, instrument, data: Path, count: int, seed: int) -> dict[str, float]:
    """Distances of a pipeline's reconstructions, perturbed reconstructions and samples."""
    import torch

    from vistok.data import DataConfig
    from vistok.eval.networks import CallableNetwork
    from vistok.eval.perturbation import Grid, evaluate_perturbation

    classifier = instrument.load()
    network = CallableNetwork(lambda images: classifier.features(images.float() / 127.5 - 1), "CIFAR-10 classifier")
    test = DataConfig(32, root=str(data), split="test", limit=count)
    grid = Grid(RATES, STRENGTHS)
    found = evaluate_perturbation(pipe.tokenizer, test, network, grid=grid, seed=seed)["scores"]
    classes = len(pipe.class_names)
    made = pipe(list(range(classes)), count // classes, seed=seed, batch_size=250).pixels
    with torch.no_grad():
        features = [
            torch.cat([classifier.features(part) for part in side.split(250)]) for side in (made, real(data, count))
        ]
    samples = instrument.frechet_distance(*features)
    return {
        "rec": found["frechet_distance"],
        "perturbed": found["perturbed_frechet_distance"],
        "samples": float(samples),
    }


def real(data: Path, count: int):
    """Training images (N, 3, 32, 32) in [-1, 1], evenly spread over them."""
    import torch

    from vistok.data import DataConfig, evaluation_loader, open_source

    config = DataConfig(32, root=str(data), limit=count, batch_size=500)
    return torch.cat([batch.pixels for batch in evaluation_loader(open_source(config), config)])


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """All rows as Markdown: a score for each seed."""
    lines = [f"| tokenizer | {' | '.join(SCORES)} |", f"|---|{'---|' * len(SCORES)}"]
    for name, several in rows.items():
        values = (" / ".join(f"{scores[key]:.2f}" for scores in several) for key in SCORES)
        lines.append(f"| {name.replace('_', ', ')} training | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
