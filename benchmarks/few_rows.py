"""The products of a sampling step by each way of computing them on a CPU: how fast do the weights arrive?

    python benchmarks/few_rows.py --threads 2

All matrix products of LlamaGen's GPT-B (random weights), one after another as in a step: in PyTorch's layout, packed by
oneDNN, and in bfloat16 by the kernel for AMX where the processor has it. Beside them a plain sum over as many bytes.
Everything is measured in turn; medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from common import finish, say, use_threads
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.generators.engine import amx
from vistok.generators.llama import Llama
from vistok.types import TokenSpec
from vistok.utils.devices import DTYPES


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    ratios, figures = {}, {"threads": arguments.threads}
    for name in ("fp32", "bf16"):
        weights = layer_weights(DTYPES[name])
        size = sum(weight.nbytes for weight in weights)
        for rows in arguments.rows:
            took = measure(works(weights, rows), arguments.repeats)
            figures |= {f"ms_{way}_{name}_{rows}": 1e3 * seconds for way, seconds in took.items()}
            figures |= {f"gb_per_second_{way}_{name}_{rows}": size / seconds / 1e9 for way, seconds in took.items()}
            if "amx" in took:
                ratios[f"packed_over_amx_{name}_{rows}"] = took["packed"] / took["amx"]
            shown = (f"{way} {1e3 * seconds:.1f} ms, {size / seconds / 1e9:.1f} GB/s" for way, seconds in took.items())
            say(f"{name}, {rows} rows: {'; '.join(shown)}")
    finish("few_rows", ratios, figures)


def layer_weights(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    model = Llama(TokenSpec(256, 16384, dim=8, grid=(16, 16)), **Llama.sizes["B"]).to(dtype)
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]


def works(weights: list[Tensor], rows: int) -> dict[str, Callable[[], None]]:
    """Each way of multiplying ``rows`` rows by all weights."""
    inputs = {width: torch.randn(rows, width).to(weights[0].dtype) for width in {w.shape[1] for w in weights}}
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

    def multiply(product: Callable[[Tensor, Tensor], Tensor], layout: list[Tensor]) -> None:
        for weight, laid_out in zip(weights, layout, strict=True):
            product(inputs[weight.shape[1]], laid_out)

    ways = {
        "plain": lambda: multiply(F.linear, weights),
        "packed": lambda: multiply(lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), packed),
        "sum": lambda: [weight.view(torch.float32).sum() for weight in weights],
    }
    if rows <= amx.MOST_ROWS and all(map(amx.suits, weights)):
        ways["amx"] = lambda: multiply(lambda x, w: amx.linear(x, w, None), weights)
    return ways


@torch.inference_mode()
def measure(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each; of three runs in a row the first finds other data in the processor's caches."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, work), i in itertools.product(range(repeats), ways.items(), range(3)):
        begin = time.perf_counter()
        work()
        if i:
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
