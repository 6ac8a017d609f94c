"""CIFAR-10 end to end: a tokenizer beside a k-means patch quantizer of the same rate, then a generator on its tokens.

    python benchmarks/cifar10.py --tokenizer llamagen_vq --minutes 20 --generator-minutes 15

The tokenizer trains for a stated number of minutes (its first steps set the number of steps) and is scored by PSNR on
the 10,000 test images. The floor is fitted in the same run: k-means on 4x4 patches with as many codes (64 tokens of
1,024 codes: 640 bits per image for both). The generator's samples are scored by a fixed CIFAR-10 classifier, before
and after training: the share recognised as the class asked for, and the Frechet distance on its features to training
images. Those scores carry the classifier's name; they are not FID.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import ROOT, find, finish, load_instrument, say

CODES, PATCH = 1024, 4


def main() -> None:
    arguments = parse_arguments()
    data = find(arguments.data, "data/cifar10.zip", "--data")
    instrument = load_instrument(find(arguments.instrument, "instruments/cifar10_classifier.py", "--instrument"))
    out = Path(arguments.out or tempfile.mkdtemp(prefix="vistok-cifar10-"))

    floor = kmeans_psnr(data)
    say(f"k-means on {PATCH}x{PATCH} patches, {CODES} codes: {floor:.2f} dB on the test images")
    config = ROOT / "configs" / "cifar10" / f"{arguments.tokenizer}.yaml"
    if arguments.tokenizer_run:
        tokenizer_run = Path(arguments.tokenizer_run)
    else:
        tokenizer_run = train_for(config, arguments.minutes, out / "tokenizer", [f"data.root={data}"])
    psnr = test_psnr(tokenizer_run, data)
    say(f"{arguments.tokenizer} after {training_seconds(tokenizer_run) / 60:.1f} minutes of training: {psnr:.2f} dB")
    figures = {"tokenizer": arguments.tokenizer, "training_seconds": training_seconds(tokenizer_run)}
    figures |= {"psnr": psnr, "psnr_kmeans": floor}

    if arguments.generator_minutes:
        tokens = tokenize_training_images(tokenizer_run, data, out / "tokens")
        config = ROOT / "configs" / "cifar10" / f"{arguments.generator}.yaml"
        run = train_for(config, arguments.generator_minutes, out / "generator", [f"tokens={tokens}"])
        untrained = train_steps(config, 1, out / "untrained", [f"tokens={tokens}", "optimizer.lr=0.0"])
        real = real_features(instrument, data)
        for name, folder in (("before", untrained), ("after", run)):
            figures |= {f"{key}_{name}": value for key, value in score(instrument, folder, real, arguments.num).items()}
        figures |= {"generator": arguments.generator, "generator_training_seconds": training_seconds(run)}
        figures["samples"] = arguments.num
    say(f"everything is in {out}")
    finish("cifar10", {"psnr_over_kmeans_db": psnr - floor}, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="llamagen_vq", help="config in configs/cifar10/")
    parser.add_argument("--tokenizer-run", help="a run of that config to go on from, instead of training one")
    parser.add_argument("--generator", default="llama", help="config in configs/cifar10/")
    parser.add_argument("--minutes", type=float, default=5, help="training time of the tokenizer")
    parser.add_argument("--generator-minutes", type=float, default=3, help="of the generator; 0 leaves it out")
    parser.add_argument("--num", type=int, default=1000, help="samples that are scored")
    parser.add_argument("--data", help="CIFAR-10 as a .zip or folder in ImageFolder layout")
    parser.add_argument("--instrument", help="the classifier's module")
    parser.add_argument("--out", help="folder for the runs; a temporary one by default")
    return parser.parse_args()


def images(data: Path, split: str, limit: int | None = None):
    """Pixels (N, 3, 32, 32) in [-1, 1] and labels of a split."""
    import torch

    from vistok.data import DataConfig, evaluation_loader, open_source

    config = DataConfig(32, root=str(data), split=split, batch_size=1000, limit=limit)
    batches = list(evaluation_loader(open_source(config), config))
    return torch.cat([b.pixels for b in batches]), torch.cat([b.labels for b in batches])


def kmeans_psnr(data: Path) -> float:
    """PSNR on the test images of the nearest of k-means centres fitted to training patches."""
    import torch
    from einops import rearrange
    from sklearn.cluster import MiniBatchKMeans

    from vistok.train.stages import psnr

    def patches(pixels):
        return rearrange(pixels, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH)

    train, test = patches(images(data, "train", 5000)[0]), images(data, "test")[0]
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
    """Train for about ``minutes``: a trial of a few steps tells how many steps that is."""
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


def test_psnr(run: Path, data: Path) -> float:
    from vistok.data import DataConfig
    from vistok.eval.tokenizers import evaluate_tokenizer
    from vistok.pipelines import load_tokenizer

    config = DataConfig(32, root=str(data), split="test", batch_size=250)
    return evaluate_tokenizer(load_tokenizer(run), config)["scores"]["psnr"]


def tokenize_training_images(run: Path, data: Path, out: Path) -> Path:
    from vistok.data import DataConfig
    from vistok.pipelines import load_tokenizer
    from vistok.train.tokenize import tokenize

    tokenize(load_tokenizer(run), DataConfig(32, root=str(data), batch_size=250), out, augmentation="flip")
    return out


def real_features(instrument, data: Path):
    """The classifier's features (N, D) of 5,000 training images."""
    import torch

    with torch.no_grad():
        return torch.cat([instrument.load().features(part) for part in images(data, "train", 5000)[0].split(500)])


def score(instrument, run: Path, real, count: int) -> dict[str, float]:
    """Class agreement and Frechet distance of class-balanced samples, by the instrument."""
    import torch

    from vistok.pipelines import pipeline

    pipe, classifier = pipeline(run), instrument.load()
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
