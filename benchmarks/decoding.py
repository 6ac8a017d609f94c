"""Cached sampling against memory bandwidth: a step reads every weight and the live cache at least once.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --device cuda --size XL --dtype bf16 --compile --batch-sizes 1,4,16,64,256

The lower bound of a step is the bytes of its weight matrices (embedding tables are only looked up) and of the cache
filled on average, divided by the rate at which this machine copies large tensors, measured in the same run. Whole
sequences are timed after one that compiles and warms up; without a GPU only their first tokens are.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from common import finish, say
from torch import nn
from training import synchronise

from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.llama import Llama
from vistok.types import Condition, TokenSpec
from vistok.utils.devices import DTYPES

CODES = 16384


def main() -> None:
    arguments = parse_arguments()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    tokens = arguments.tokens or (arguments.length if device.type == "cuda" else 16)
    side = math.isqrt(arguments.length)
    with device:
        torch.manual_seed(0)
        spec = TokenSpec(arguments.length, CODES, dim=8, grid=(side, side))
        model = Llama(spec, **Llama.sizes[arguments.size]).to(dtype).eval()
    nn.init.normal_(model.output.weight, std=0.02)  # training starts at zero
    if arguments.compile:
        model.compile_decoding()
    bandwidth = copy_rate(device)
    say(f"copies at {bandwidth / 1e9:.1f} GB/s")
    ratios, figures = {}, {"copy_gb_per_second": bandwidth / 1e9, "weights_mb": weight_bytes(model) / 2**20}
    for batch in arguments.batch_sizes:
        seconds = seconds_per_step(model, batch, tokens, arguments.guidance_scale)
        guided = arguments.guidance_scale != 1
        filled = (1 + tokens / 2) / (1 + arguments.length)
        bound = (weight_bytes(model) + filled * model.cache_bytes(batch, guided=guided)) / bandwidth
        ratios[f"of_bandwidth_bound_{batch}"] = bound / seconds
        figures |= {f"ms_per_step_{batch}": 1e3 * seconds, f"tokens_per_second_{batch}": batch / seconds}
        say(f"batch {batch}: {1e3 * seconds:.2f} ms per step, {bound / seconds:.2f} of the bound")
    names = ("size", "dtype", "compile", "length", "guidance_scale")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    settings = {name: getattr(arguments, name) for name in names} | {"tokens": tokens, "device": machine}
    finish("decoding", ratios, figures | settings)


def seconds_per_step(model: Llama, batch: int, tokens: int, guidance_scale: float) -> float:
    """Mean over the first ``tokens`` tokens, without feeding the condition."""
    options = DecodingOptions(guidance_scale=guidance_scale)
    draws = model.sampling_draws(Keys.range(0, batch), options)
    condition, device = Condition.from_labels(torch.arange(batch) % 1000), model.output.weight.device
    for _ in range(2):  # the first pass compiles
        session = model.start(condition, options, draws=draws)
        synchronise(device)
        begin = time.perf_counter()
        for _ in session.generate(tokens):
            pass
        synchronise(device)
    return (time.perf_counter() - begin) / tokens


def weight_bytes(model: Llama) -> int:
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))


def copy_rate(device: torch.device, size: int = 1 << 28, repeats: int = 10) -> float:
    """Bytes read and written per second, the best of several copies of ``size`` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        synchronise(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size / best


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=Llama.sizes, default="B")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="compiled steps, on a GPU in a CUDA graph")
    parser.add_argument("--length", type=int, default=256, help="tokens of an image; a square number")
    parser.add_argument("--tokens", type=int, help="that are sampled; all of them on a GPU, else 16")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--batch-sizes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4])
    return parser.parse_args()


if __name__ == "__main__":
    main()
