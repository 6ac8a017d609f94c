"""Whether the loaders keep up with the models: images per second of each source and of training steps.

Images: 256 px photos as single JPEG files, as webdataset shards, and as a cache of tokens (256 ids each, ten views).
Models: a training step of the ViT-VQGAN-small tokenizer on images, and of GPT-B (111 M parameters) on tokens.

    python benchmarks/data.py --root ../shared/data/imagenet_samples.zip

On a GPU add ``--device cuda --batch-size 64 --num-workers 8``. Target: the token cache is 10 times as fast as GPT-B.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from common import find, finish, say
from training import WORKLOADS, Step

from vistok.data import DataConfig, Loader, TokenCache, TokenWriter, open_source, token_loader, training_loader

LENGTH, CODEBOOK, VIEWS = 256, 16384, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="zip file of photos in class folders")
    parser.add_argument("--images", type=int, default=512, help="photos that are read per pass")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3, help="training steps that are timed")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    root = find(arguments.root, "data/imagenet_samples.zip", "--root")
    with tempfile.TemporaryDirectory() as scratch:
        folder, shards = unpack(root, Path(scratch), arguments.images)
        rates = {
            "folder": images_per_second({"root": str(folder)}, arguments),
            "webdataset": images_per_second({"source": "webdataset", "root": f"{shards}/*.tar"}, arguments),
            "token_cache": tokens_per_second(Path(scratch) / "tokens", arguments),
        }
    for name, rate in rates.items():
        say(f"{name:12} {rate:10.1f} images/s")
    models = {
        "tokenizer": training_rate("vit_vqgan_small", arguments),
        "gpt_b": training_rate("llama_b", arguments),
    }
    for name, rate in models.items():
        say(f"{name:12} {rate:10.1f} images/s in training")
    ratios = {
        "folder_over_tokenizer": rates["folder"] / models["tokenizer"],
        "webdataset_over_tokenizer": rates["webdataset"] / models["tokenizer"],
        "token_cache_over_gpt_b": rates["token_cache"] / models["gpt_b"],
    }
    figures = {f"{name}_images_per_second": rate for name, rate in {**rates, **models}.items()}
    options = ("batch_size", "num_workers", "device")
    finish("data", ratios, figures | {name: getattr(arguments, name) for name in options})


def unpack(archive: Path, scratch: Path, count: int) -> tuple[Path, Path]:
    """Unpack the first photos into a folder of files, and into shards of 128."""
    folder, shards = scratch / "folder", scratch / "shards"
    shards.mkdir()
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))][:count]
        labels = {name: number for number, name in enumerate(sorted({Path(name).parent for name in names}))}
        for start in range(0, len(names), 128):
            with tarfile.open(shards / f"{start // 128:04d}.tar", "w") as tar:
                for number, name in enumerate(names[start : start + 128], start):
                    content = source.read(name)
                    path = folder / Path(name).parent.name / f"{number:06d}{Path(name).suffix}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    add(tar, f"{number:06d}{Path(name).suffix}", content)
                    add(tar, f"{number:06d}.cls", str(labels[Path(name).parent]).encode())
    return folder, shards


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def rate_of(loader: Loader, seconds: float = 5.0) -> float:
    """Images per second over whole epochs for at least ``seconds``, after a first batch that starts the workers."""
    next(iter(loader))
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for batch in loader:
            count += len(batch.indices)
    return count / (time.perf_counter() - begin)


def images_per_second(source: dict[str, Any], arguments: argparse.Namespace) -> float:
    data = DataConfig(
        256,
        split=None,
        crop="random_resized",
        flip=True,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        **source,
    )
    return rate_of(training_loader(open_source(data), data))


def tokens_per_second(folder: Path, arguments: argparse.Namespace, count: int = 20000) -> float:
    """Images per second of a token cache that is read in random order."""
    spec = {"length": LENGTH, "codebook_size": CODEBOOK, "dim": 8, "num_layers": 1, "grid": (16, 16)}
    with TokenWriter(folder, spec, "benchmark", views=VIEWS, classes=("one",)) as writer:
        for _ in range(0, count, 1000):
            tokens = torch.randint(CODEBOOK, (1000, VIEWS, LENGTH))
            writer.write(tokens, torch.zeros(1000, dtype=torch.int64))
    return rate_of(token_loader(TokenCache(folder), arguments.batch_size, num_workers=arguments.num_workers))


def training_rate(model: str, arguments: argparse.Namespace) -> float:
    """Images per second of training steps: the median of several, after one that warms up."""
    step = Step(WORKLOADS[model](arguments.batch_size, arguments.device), arguments.device, torch.float32)
    return arguments.batch_size / statistics.median([step() for _ in range(arguments.steps + 1)][1:])


if __name__ == "__main__":
    main()
