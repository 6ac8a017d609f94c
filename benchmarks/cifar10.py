"""CIFAR-10 end to end: a tokenizer, compared with a simple one fitted in the same run, then a generator on its tokens.

    python benchmarks/cifar10.py --tokenizer llamagen_vq --minutes 20 --generator-minutes 15
    python benchmarks/cifar10.py --tokenizer flextok --minutes 25 --generator-minutes 0 --images 1000

The tokenizer trains for a stated number of minutes (its first steps set the number of steps) and is scored by PSNR, the
mean over test images. It is compared with:

- for 64 tokens of 1,024 codes, k-means on 4x4 patches with as many codes, which has the same rate of 640 bits per
  image. Other rates have no such baseline;
- for ordered tokens (FlexTok, D-AR), at each prefix of k = 1, 4, 16 and all tokens that decodes, PCA with k dimensions,
  fitted to 10,000 training images. It gives a scale but no lower bound: its dimensions are floats, and it does not
  sample. Prefixes of one image decode from the same noise, without guidance. They are also scored by the Frechet
  distance to the originals on features of a fixed CIFAR-10 classifier.

Flow decoders are slow: ``--images`` sets how many test images, evenly spread over the 10,000, are scored.

The generator's samples are scored by the same classifier, before and after training: the share recognised as the class
asked for, and the Frechet distance on its features to training images. These scores are named after the classifier;
they are not FID.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import RECIPES, find, finish, load_instrument, say

CODES, PATCH = 1024, 4


def main() -> None:
    arguments = parse_arguments()
    data = find(arguments.data, "data/cifar10.zip", "--data")
    instrument = load_instrument(find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument"))
    out = Path(arguments.out or tempfile.mkdtemp(prefix="vistok-cifar10-"))

    config = RECIPES / "cifar10" / f"{arguments.tokenizer}.yaml"
    if arguments.tokenizer_run:
        tokenizer_run = Path(arguments.tokenizer_run)
    else:
        tokenizer_run = train_for(config, arguments.minutes, out / "tokenizer", [f"data.root={data}"])
    figures = {"tokenizer": arguments.tokenizer, "training_seconds": training_seconds(tokenizer_run)}
    say(f"{arguments.tokenizer} after {figures['training_seconds'] / 60:.1f} minutes of training:")
    ratios, scores = score_tokenizer(tokenizer_run, data, instrument, arguments.images)
    figures |= scores

    if arguments.generator_minutes:
        tokens = tokenize_training_images(tokenizer_run, data, out / "tokens")
        config = RECIPES / "cifar10" / f"{arguments.generator}.yaml"
        run = train_for(config, arguments.generator_minutes, out / "generator", [f"tokens={tokens}"])
        untrained = train_steps(config, 1, out / "untrained", [f"tokens={tokens}", "optimizer.lr=0.0"])
        real = real_features(instrument, data)
        for name, folder in (("before", untrained), ("after", run)):
            figures |= {f"{key}_{name}": value for key, value in score(instrument, folder, real, arguments.num).items()}
        figures |= {"generator": arguments.generator, "generator_training_seconds": training_seconds(run)}
        figures["samples"] = arguments.num
    say(f"everything is in {out}")
    finish("cifar10", ratios, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="llamagen_vq", help="a config of `vistok configs cifar10`")
    parser.add_argument("--tokenizer-run", help="a run of that config to go on from, instead of training one")
    parser.add_argument("--generator", default="llama", help="a config of `vistok configs cifar10`")
    parser.add_argument("--minutes", type=float, default=5, help="training time of the tokenizer")
    parser.add_argument("--generator-minutes", type=float, default=3, help="of the generator; 0 leaves it out")
    parser.add_argument("--images", type=int, default=10_000, help="test images that the tokenizer is scored on")
    parser.add_argument("--num", type=int, default=1000, help="samples that are scored")
    parser.add_argument("--data", help="CIFAR-10 as a .zip or folder in ImageFolder layout")
    parser.add_argument("--instrument", help="the classifier's module")
    parser.add_argument("--out", help="folder for the runs; a temporary one by default")
    return parser.parse_args()


def score_tokenizer(run: Path, data: Path, instrument, count: int) -> tuple[dict, dict]:
    """Ratios and figures of a trained tokenizer against its baselines."""
    from prefixes import prefix_figures

    from vistok.pipelines.folders import load_tokenizer

    tokenizer = load_tokenizer(run).eval()
    spec, ratios = tokenizer.spec, {}
    if spec.prefix_step is None:
        figures = {"psnr": test_psnr(tokenizer, data, count), "images": count}
    else:
        pixels = [images(data, split, limit)[0] for split, limit in (("test", count), ("train", 10_000))]
        ratios, figures = prefix_figures(tokenizer, instrument, *pixels)
    say(f"{spec.length} tokens of {spec.codebook_size}: {figures['psnr']:.2f} dB on {count:,} test images")
    if spec.discrete and (spec.length, spec.codebook_size) == ((32 // PATCH) ** 2, CODES):
        floor = kmeans_psnr(data, count)
        say(f"k-means on {PATCH}x{PATCH} patches, {CODES} codes, the same rate: {floor:.2f} dB")
        ratios, figures = ratios | {"psnr_over_kmeans_db": figures["psnr"] - floor}, figures | {"psnr_kmeans": floor}
    return ratios, figures


def images(data: Path, split: str, limit: int | None = None):
    """Pixels (N, 3, 32, 32) in [-1, 1] and labels of a split, or of ``limit`` images evenly spread over it."""
    import torch

    from vistok.data import DataConfig, evaluation_loader, open_source

    config = DataConfig(32, root=str(data), split=split, batch_size=1000, limit=limit)
    batches = list(evaluation_loader(open_source(config), config))
    return torch.cat([b.pixels for b in batches]), torch.cat([b.labels for b in batches])


def kmeans_psnr(data: Path, count: int) -> float:
    """PSNR of test images whose patches are replaced by the nearest k-means centres of training patches."""
    import torch
    from einops import rearrange
    from sklearn.cluster import MiniBatchKMeans

    from vistok.train.tasks.images import psnr

    def patches(pixels):
        return rearrange(pixels, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH)

    train, test = patches(images(data, "train", 5000)[0]), images(data, "test", count)[0]
    fitted = MiniBatchKMeans(CODES, batch_size=8192, n_init=1, max_iter=30, random_state=0).fit(train.numpy())
    centres = torch.from_numpy(fitted.cluster_centers_).float()
    nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in patches(test).split(65536)])
    size = {"h": 32 // PATCH, "w": 32 // PATCH, "p": PATCH, "q": PATCH}
    return psnr(rearrange(centres[nearest], "(b h w) (c p q) -> b c (h p) (w q)", **size), test).item()


def train_steps(config: Path, steps: int, out: Path, overrides: list[str]) -> Path:
    from vistok.config import load_config
    from vistok.train import train

    rhythm = [
        f"training.{name}_every={max(steps // parts, 1)}" for name, parts in (("log", 50), ("save", 2), ("image", 4))
    ]
    return train(load_config(config, [*overrides, f"output_dir={out}", f"training.max_steps={steps}", *rhythm]))


def train_for(config: Path, minutes: float, out: Path, overrides: list[str], trial: int = 40) -> Path:
    """Train for about ``minutes``; the number of steps is estimated from a short trial."""
    from vistok.train.monitor import read_metrics

    folder = train_steps(config, trial, out.with_name(f"{out.name}-trial"), overrides)
    rows = read_metrics(folder / "metrics.jsonl")
    half = next(row for row in rows if row["step"] >= trial // 2)  # the first steps warm up
    seconds = (rows[-1]["seconds"] - half["seconds"]) / (rows[-1]["step"] - half["step"])
    steps = max(int(60 * minutes / seconds), 1)
    say(f"{config.stem}: {seconds:.3f} s per step, {steps} steps")
    return train_steps(config, steps, out, overrides)


def training_seconds(run: Path) -> float:
    from vistok.train.monitor import read_metrics

    return read_metrics(run / "metrics.jsonl")[-1]["seconds"]


def test_psnr(tokenizer, data: Path, count: int) -> float:
    from vistok.data import DataConfig
    from vistok.eval.tokenizers import evaluate_tokenizer

    config = DataConfig(32, root=str(data), split="test", batch_size=250, limit=count)
    return evaluate_tokenizer(tokenizer, config)["scores"]["psnr"]


def tokenize_training_images(run: Path, data: Path, out: Path) -> Path:
    from vistok.data import DataConfig
    from vistok.pipelines.folders import load_tokenizer
    from vistok.train.tokenize import tokenize

    tokenize(load_tokenizer(run), DataConfig(32, root=str(data), batch_size=250), out, augmentation="flip")
    return out


def real_features(instrument, data: Path):
    """The classifier's features (N, D) of 5,000 training images."""
    import torch

    with torch.no_grad():
        return torch.cat([instrument.load().features(part) for part in images(data, "train", 5000)[0].split(500)])


def score(instrument, run: Path, real, count: int) -> dict[str, float]:
    """Class agreement and Frechet distance of class-balanced samples, by the classifier ``instrument``."""
    from vistok.pipelines import pipeline

    return score_pipeline(instrument, pipeline(run), real, count)


def score_pipeline(instrument, pipe, real, count: int) -> dict[str, float]:
    """As ``score``, for a loaded pipeline."""
    import torch

    classifier = instrument.load()
    made = pipe(list(range(10)), num_images_per_label=count // 10, batch_size=250)
    with torch.no_grad():
        parts = made.pixels.split(500)
        agreement = torch.cat([classifier(part).argmax(1) for part in parts]) == torch.tensor(made.labels)
        features = torch.cat([classifier.features(part) for part in parts])
    return {
        "agreement": agreement.float().mean().item(),
        "frechet_cifar10_classifier": instrument.frechet_distance(features, real),
    }


if __name__ == "__main__":
    main()
