"""Cached sampling of LlamaGen's GPT-B against the machine's floor; a step should take at most 1.3 times as long.

    python benchmarks/sampling.py --threads 2

The model has 111 M random weights and samples a batch of 4 with guidance, 8 rows. The floor of a step is the time of
the bare matrix products of the same weights with 8 rows, in PyTorch's layout, plus bare scaled dot-product attention
over the live part of the same cache. It is measured in the same run, alternating with the step, so that a busy machine
slows both alike. Sampling packs its weights for a few rows, so it can be faster than the floor; packing takes as long
as a few steps and is not timed. Two other times are reported: of a bare sum over the bytes that a step reads (weights
and live cache), and of LlamaGen's own loop in float32, rebuilt from its description.

The time of a step grows linearly with the cache, so a few evenly spaced stretches give the mean over a sequence. For
each the cache is filled with random keys and values, and rewound. A stretch is several consecutive steps; the first are
not timed, because the CPU's caches still hold other data. Medians over steps and repeats are reported. Recomputing the
whole prefix for each token, without a cache, is measured once per position.

At the end xAR and MAR sample continuous tokens, see ``sampling_continuous.py``.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from common import finish, say, use_threads
from sampling_continuous import compare_all
from torch import nn
from torch.nn import functional as F

from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.llama import Llama
from vistok.nn.rotary import rotate
from vistok.types import Condition, TokenSpec

BATCH, CODES = 4, 16384
UNTIMED, TIMED = 4, 8  # steps of a stretch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Setting:
    """One model with a full cache; each measurement uses the first part of it."""

    def __init__(self, length: int, dtype: torch.dtype, options: DecodingOptions):
        side = math.isqrt(length)
        torch.manual_seed(0)
        self.model = Llama(TokenSpec(length, CODES, dim=8, grid=(side, side)), **Llama.sizes["B"])
        nn.init.normal_(self.model.output.weight, std=0.02)  # training starts at zero
        self.model.eval().to(dtype)
        self.condition = Condition.from_labels(torch.arange(BATCH))
        draws = self.model.sampling_draws(Keys.range(0, BATCH), options)
        self.session = self.model.start(self.condition, options, draws=draws)
        self.ids = torch.randint(CODES, (BATCH, length))
        self.session.append(self.ids)
        rows, attention = len(self.session.rows), self.model.blocks[0].attn
        shape = (rows, attention.num_heads, length, attention.head_dim)
        for layer in self.session.kv_cache.layers:
            layer.append(*(torch.randn(shape) for _ in range(2)))
        shape = (rows, attention.num_heads, 1 + length, attention.head_dim)
        self.memory = [[torch.randn(shape, dtype=dtype) for _ in range(2)] for _ in self.model.blocks]
        self.inputs = {width: torch.randn(rows, width, dtype=dtype) for width in self._widths()}
        self.weights = [linear.weight for linear in self.model.modules() if isinstance(linear, nn.Linear)]
        self.query = torch.randn(rows, attention.num_heads, 1, attention.head_dim, dtype=dtype)

    def _widths(self) -> set[int]:
        return {linear.in_features for linear in self.model.modules() if isinstance(linear, nn.Linear)}

    def step(self, position: int) -> None:
        """Feed the token before ``position``, and sample the one there."""
        for layer in self.session.kv_cache.layers:  # the whole cache is filled, so its live part may also grow
            layer.length = self.model.condition_length + position - 1
        self.session.step, self.session.seen = position, position - 1
        next(self.session.generate(1))

    @torch.inference_mode()
    def floor(self, position: int) -> None:
        """The matrix products and the attention that every implementation of a step needs."""
        live = self.model.condition_length + position
        for block, (key, value) in zip(self.model.blocks, self.memory, strict=True):
            self._product(block.attn.qkv)
            F.scaled_dot_product_attention(self.query, key.narrow(2, 0, live), value.narrow(2, 0, live))
            for linear in (block.attn.out, block.ffn.gate, block.ffn.up, block.ffn.down):
                self._product(linear)
        self._product(self.model.output)

    def _product(self, linear: nn.Linear) -> None:
        F.linear(self.inputs[linear.in_features], linear.weight)

    @torch.inference_mode()
    def bytes(self, position: int) -> None:
        """A bare sum over what a step reads: the weights and the live part of the cache."""
        live = self.model.condition_length + position
        for weight in self.weights:
            weight.sum()
        for key, value in self.memory:
            key.narrow(2, 0, live).sum()
            value.narrow(2, 0, live).sum()

    @torch.inference_mode()
    def reference(self, position: int) -> None:
        """A step of LlamaGen's own loop: attention over the whole padded cache under a boolean mask, separate gate and
        up projections, and a sort of the vocabulary before the draw."""
        model, entry = self.model, slice(position, position + 1)
        x = model.embed_tokens(self.ids[:, position - 1 : position].repeat(2, 1), None, None)
        seen = torch.arange(self.memory[0][0].shape[2]) <= position
        rotation = model.rotation(entry)
        for block, (key, value) in zip(model.blocks, self.memory, strict=True):
            attention = block.attn
            q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            key[:, :, entry], value[:, :, entry] = rotate(k, rotation), v
            mixed = F.scaled_dot_product_attention(rotate(q, rotation), key, value, attn_mask=seen[None])
            x = x + attention.out(mixed.transpose(1, 2).flatten(2))
            x = x + block.ffn(block.norm2(x))
        conditional, null = model.head(x[:, -1]).chunk(2)
        logits = null + 2.0 * (conditional - null)
        ordered, order = logits.sort(descending=True)
        excluded = ordered.softmax(-1).cumsum(-1) > 1.0
        probabilities = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf).softmax(-1)
        torch.multinomial(probabilities, 1)

    @torch.inference_mode()
    def recompute(self, position: int) -> None:
        """The logits of ``position`` from the whole prefix, without a cache."""
        x = self.model.embed_sequence(self.ids[:, :position].repeat(2, 1), self.session.rows)
        self.model.head(self.model.transform(x, slice(0, x.shape[1]), None, None)[:, -1])


def positions(length: int, count: int) -> list[int]:
    """The middles of ``count`` equal parts of a sequence."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def seconds(work: Callable[[int], None], position: int) -> float:
    start = time.perf_counter()
    work(position)
    return time.perf_counter() - start


def stretch(work: Callable[[int], None], position: int) -> list[float]:
    """Seconds of each step from ``position`` on."""
    for ahead in range(UNTIMED, 0, -1):
        work(position - ahead)
    return [seconds(work, position + i) for i in range(TIMED)]


def measure(settings: dict[str, Setting], where: Sequence[int], repeats: int) -> dict[str, float]:
    """Median milliseconds of a step and of its floor by name, "fp32", "fp32_floor", ...; measurements alternate."""
    works = {}
    for name, setting in settings.items():
        works |= {name: setting.step, f"{name}_floor": setting.floor, f"{name}_bytes": setting.bytes}
    works["reference"] = settings["fp32"].reference
    for work in works.values():
        work(where[-1])  # first calls are slower
    measured = {name: {position: [] for position in where} for name in works}
    for _ in range(repeats):
        for position in where:
            for name, work in works.items():
                measured[name][position] += stretch(work, position)
    return {
        name: 1e3 * statistics.fmean(statistics.median(times) for times in by_position.values())
        for name, by_position in measured.items()
    }


def peak_memory_mb() -> float:
    """The peak resident size of this process in MB."""
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    options = DecodingOptions(guidance_scale=2.0, top_k=arguments.top_k)
    ratios, figures = {}, {"threads": arguments.threads, "batch": BATCH, "top_k": arguments.top_k}
    for length in (256, 1024):
        suffix = "" if length == 256 else f"_{length}"
        settings = {name: Setting(length, dtype, options) for name, dtype in DTYPES.items()}
        where = positions(length, arguments.positions)
        before = peak_memory_mb()
        took = measure(settings, where, arguments.repeats)
        figures[f"memory_growth_mb{suffix}"] = peak_memory_mb() - before
        if length == 1024:
            slow = 1e3 * statistics.fmean(seconds(settings["fp32"].recompute, position) for position in where)
            ratios["recompute_over_cached_1024"] = slow / took["fp32"]
            figures["ms_per_step_recompute_1024"] = slow
        for name in DTYPES:
            ratios[f"over_floor_{name}{suffix}"] = took[name] / took[f"{name}_floor"]
            ratios[f"over_bytes_{name}{suffix}"] = took[name] / took[f"{name}_bytes"]
            ratios[f"over_reference_{name}{suffix}"] = took[name] / took["reference"]
        for name, setting in settings.items():
            figures |= {
                f"ms_per_step_{name}{suffix}": took[name],
                f"ms_floor_{name}{suffix}": took[f"{name}_floor"],
                f"ms_bytes_{name}{suffix}": took[f"{name}_bytes"],
                f"tokens_per_second_{name}{suffix}": 1e3 * BATCH / took[name],
                f"cache_mb_{name}{suffix}": setting.session.kv_cache.nbytes / 2**20,
            }
            others = ", ".join(f"{what} {took[f'{name}_{what}']:.1f} ms" for what in ("floor", "bytes"))
            say(f"{length} tokens, {name}: {took[name]:.1f} ms, {others}, reference {took['reference']:.1f} ms")
        figures[f"ms_per_step_reference{suffix}"] = took["reference"]
        ratios[f"fp32_over_bf16{suffix}"] = took["fp32"] / took["bf16"]
    figures["peak_memory_mb"] = peak_memory_mb()
    continuous_ratios, continuous_figures = compare_all(repeats=1)
    finish("sampling", ratios | continuous_ratios, figures | continuous_figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each stretch")
    parser.add_argument("--positions", type=int, default=4, help="stretches measured, of each length")
    parser.add_argument("--top-k", type=int, default=0, help="truncation of the distribution; 0 is off")
    return parser.parse_args()


if __name__ == "__main__":
    main()
