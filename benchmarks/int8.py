"""Weight-only int8 (torchao) against floating point: time of a sampling step, and change of the teacher-forced loss.

    pip install torchao
    python benchmarks/int8.py --run RUN    # RUN: the run of a generator, such as quickstart/generator

Steps are those of ``sampling.py``: GPT-B, random weights, a batch of 4 with guidance; they alternate with steps of the
same model in floating point. The loss is that of the run's averaged weights on the first cached tokens of its training
data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from common import finish, say, use_threads
from sampling import DTYPES, Setting, positions, stretch

from vistok.config import load_config
from vistok.data.tokens import TokenCache
from vistok.generators.engine.sampling import DecodingOptions
from vistok.pipelines import pipeline
from vistok.types import Condition


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        sys.exit("torchao is missing; pip install torchao")
    ratios, figures = {}, {"threads": arguments.threads}
    for name, dtype in DTYPES.items():
        plain, int8 = (Setting(256, dtype, DecodingOptions(guidance_scale=2.0)) for _ in range(2))
        quantize_(int8.model, Int8WeightOnlyConfig())
        took = {"int8": step_time(int8), "packed": step_time(plain)}
        figures |= {f"ms_per_step_{name}_{kind}": value for kind, value in took.items()}
        ratios[f"int8_over_{name}"] = took["int8"] / took["packed"]
        say(f"{name}: {took['packed']:.1f} ms per step, int8 {took['int8']:.1f} ms")
    if arguments.run:
        before, after = losses(Path(arguments.run), lambda model: quantize_(model, Int8WeightOnlyConfig()))
        figures |= {"loss_fp32": before, "loss_int8": after}
        ratios["loss_int8_minus_fp32"] = after - before
        say(f"teacher-forced loss {before:.4f}, int8 {after:.4f}")
    finish("int8", ratios, figures)


def step_time(setting: Setting) -> float:
    """Milliseconds of a sampling step."""
    return 1e3 * statistics.fmean(statistics.median(stretch(setting.step, where)) for where in positions(256, 4))


@torch.inference_mode()
def losses(run: Path, quantise, count: int = 512) -> tuple[float, float]:
    """Nats per token in floating point, and after ``quantise``."""
    cache = TokenCache(load_config(run / "config.yaml")["tokens"])
    indices = np.arange(min(count, len(cache)))
    tokens, labels = cache.batch(indices, np.zeros_like(indices))
    model, condition = pipeline(run, device="cpu").generator, Condition.from_labels(labels)
    before = model(tokens, condition).loss.item()
    quantise(model)
    return before, model(tokens, condition).loss.item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a trained next-token generator; without one no loss is measured")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
