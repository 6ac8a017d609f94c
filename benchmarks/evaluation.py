"""Evaluation: speed against torch-fidelity and scipy, and memory at 50,000 features.

- Feature extraction: images per second of vistok's Inception, with spatial features, moments and hashes, against
  torch-fidelity's extractor, on the same images and weights, alternating; the median of each. Random weights take as
  long as the published ones. Target: at least 1.3 times as fast.
- Frechet term: two symmetric eigendecompositions against scipy's sqrtm of the product, with 2,048 features.
- Memory: the peak of a process that holds two sets of 50,000 x 2,048 random features, sums their moments, and computes
  precision and recall by ADM's rule on 12,000 of each (with more, blocks are no larger). Also the seconds of precision
  and recall for two sets of 10,000 on one thread, which grow with the product of both counts.

    python benchmarks/evaluation.py --images 48 --rounds 3
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from common import ROOT, finish, say
from torch import Tensor

WIDTH = 2048
MEMORY_PROBE = """
import resource, time, torch
from vistok.eval.metrics import Moments, precision_recall
torch.manual_seed(0)
torch.set_num_threads(1)
sets = [torch.empty({count}, 2048) for _ in range(2)]
for features in sets:
    moments = Moments(2048)
    for rows in features.split(500):
        moments.update(rows.normal_())
    covariance = moments.gaussian.covariance
checked = min(12_000, {count})
start = time.process_time()
precision_recall(*(features[:checked] for features in sets))
seconds = (time.process_time() - start) * (10_000 / checked) ** 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="images of 256 px per round")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, in turns")
    parser.add_argument("--features", type=int, default=50_000, help="features of the memory probe")
    arguments = parser.parse_args()

    ours, theirs = extraction_speed(arguments.images, arguments.rounds)
    say(f"extraction: {ours:.2f} images/s, torch-fidelity {theirs:.2f}")
    eigen, sqrtm, difference = frechet_times(arguments.rounds)
    say(f"Frechet term: {eigen:.2f} s, scipy's sqrtm {sqrtm:.2f} s, relative difference {difference:.1e}")
    memory, manifolds = peak_memory(arguments.features)
    say(f"two sets of {arguments.features:,} features of {WIDTH}: {memory:.2f} GB at most")
    say(f"precision and recall of 10,000 and 10,000: {manifolds:.1f} s on one thread")
    finish(
        "evaluation",
        {"extraction_over_torch_fidelity": ours / theirs, "frechet_over_sqrtm": sqrtm / eigen},
        {
            "images_per_second": ours,
            "images_per_second_torch_fidelity": theirs,
            "frechet_seconds": eigen,
            "sqrtm_seconds": sqrtm,
            "frechet_relative_difference": difference,
            "peak_gigabytes": memory,
            "precision_recall_10k_seconds": manifolds,
            "features": arguments.features,
            "threads": torch.get_num_threads(),
        },
    )


def extraction_speed(count: int, rounds: int) -> tuple[float, float]:
    """Images per second of vistok and of torch-fidelity."""
    from vistok.eval.features import FeaturePass
    from vistok.eval.networks import InceptionV3Compat

    weights = random_weights()
    network, extractor = InceptionV3Compat(weights), fidelity_extractor(weights, ["2048", "logits_unbiased"])
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)

    def ours() -> None:
        features = FeaturePass(network, "random images", keep=["pool", "logits"], moments=["pool", "spatial"])
        for batch in images.split(16):
            features.add(batch)

    @torch.no_grad()
    def theirs() -> None:
        for batch in images.split(16):
            extractor(batch)

    seconds = measure_in_turns([ours, theirs], rounds)
    return count / seconds[0], count / seconds[1]


def random_weights() -> dict[str, Tensor]:
    """Random weights of Inception with which activations do not vanish."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in fidelity_extractor({}, ["2048"]).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            weights[name] = noise * (2 / value[0].numel()) ** 0.5
        else:
            weights[name] = torch.ones_like(value) if name.endswith(("bn.weight", "running_var")) else 0.1 * noise
        weights[name] = weights[name].to(value.dtype)
    return weights


def fidelity_extractor(weights: dict[str, Tensor], features: list[str]) -> torch.nn.Module:
    """torch-fidelity's Inception, with its initial weights if none are given."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Extractor(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    return Extractor("inception-v3-compat", features, feature_extractor_weights_path=buffer).eval()


def frechet_times(rounds: int) -> tuple[float, float, float]:
    """Seconds of vistok and of sqrtm, and the relative difference of the two distances."""
    from vistok.eval.metrics import Moments, frechet_distance

    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.05, 1, WIDTH)
    sets = [torch.randn(2 * WIDTH, WIDTH, generator=generator) * scales + shift for shift in (0.0, 0.1)]
    a, b = (Moments.of(features).gaussian for features in sets)
    distances = {}

    def ours() -> None:
        distances["ours"] = frechet_distance(a, b)

    def theirs() -> None:
        from scipy.linalg import sqrtm

        root = sqrtm((a.covariance @ b.covariance).numpy()).real
        distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace()
        distances["theirs"] = float(distance)

    seconds = measure_in_turns([ours, theirs], rounds)
    return seconds[0], seconds[1], abs(distances["ours"] / distances["theirs"] - 1)


def measure_in_turns(functions: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each after a warm-up call; they alternate, so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, times in zip(functions, seconds):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [median(times[1:]) for times in seconds]


def peak_memory(count: int) -> tuple[float, float]:
    """Peak memory of a separate process in GB, and its seconds for precision and recall of 10,000 features each."""
    code = MEMORY_PROBE.format(count=count)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    gigabytes, seconds = map(float, done.stdout.split())
    return gigabytes, seconds


if __name__ == "__main__":
    main()
