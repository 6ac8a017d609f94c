"""Sampling of xAR and MAR in seconds per image, against samplers that recompute instead of caching.

    python benchmarks/sampling_continuous.py --threads 2

Both models have random weights and sample a batch of 4 with guidance from 16x16 latents of 16 channels. xAR has width
384, 4 + 4 blocks, four cells of 8x8 and 5 steps; without a cache every call runs over all entities so far. MAR has the
same width and depth, 8 iterations and 25 denoising steps. Its encoder and decoder cannot use a cache, since attention
is bidirectional, but its head denoises only the tokens of the current iteration; the other sampler denoises all unknown
tokens and keeps some. The script checks that each pair gives the same latents. The two alternate, so that a busy
machine slows both alike; medians are reported. Tokens per call are those of an image and its null row. ``sampling.py``
ends with the same figures, measured once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from common import finish, say, use_threads
from torch import Tensor, nn

from vistok.draws import Draws, Keys
from vistok.flow import guided, last
from vistok.generators.engine.continuous import ContinuousGenerator
from vistok.generators.mar.model import MAR, take
from vistok.generators.mar.sampling import MAROptions, masks_left
from vistok.generators.xar.layouts import LayoutConfig
from vistok.generators.xar.model import XAR
from vistok.generators.xar.sampling import XAROptions
from vistok.types import Condition, TokenSpec

BATCH = 4
SPEC = TokenSpec(256, None, dim=16, grid=(16, 16))
SIZE = {"dim": 384, "num_encoder_layers": 4, "num_decoder_layers": 4, "num_heads": 6}
XAR_OPTIONS = XAROptions(num_steps=5, guidance_scale=2.7)
MAR_OPTIONS = MAROptions(num_iter=8, num_steps=25, step_spacing="stride", guidance_scale=2.9)


def build_xar() -> XAR:
    torch.manual_seed(0)
    return XAR(SPEC, layout=LayoutConfig("cell", 8), **SIZE).eval()


def build_mar() -> MAR:
    torch.manual_seed(0)
    model = MAR(SPEC, num_head_layers=3, head_dim=384, **SIZE).eval()
    for module in (*(block.modulation[1] for block in model.head.blocks), model.head.modulation[1], model.head.output):
        nn.init.normal_(module.weight, std=0.02)  # training starts at zero
    return model


@torch.no_grad()
def xar_recomputed(model: XAR, condition: Condition, options: XAROptions, draws: Draws) -> Tensor:
    """xAR's sampling without a cache: every call runs over the noisy entity and all before it."""
    layout, rows = model.layout, options.guidance.conditions(condition)
    sequence = draws["noise"][:, :0]
    for entity, (start, stop) in enumerate(zip(layout.bounds, layout.bounds[1:])):
        guidance = options.guidance.at(entity, layout.num_entities)

        def velocity(x: Tensor, t: float, entity=entity, context=sequence, guidance=guidance) -> Tensor:
            context = guidance.repeat(context)
            times = torch.tensor([0.0] * entity + [t]).expand(len(x), -1)
            out = model.velocity(torch.cat([context, x.float()], 1), times, rows[: len(x)])
            return out[:, context.shape[1] :].to(x)

        noise, steps = draws["noise"][:, start:stop].double(), draws["steps"][:, :, start:stop].double()
        sequence = torch.cat([sequence, last(options.solve(guided(velocity, guidance), noise, steps)).x.float()], 1)
    return layout.to_raster(sequence)


@torch.no_grad()
def mar_recomputed(model: MAR, condition: Condition, options: MAROptions, draws: Draws) -> Tensor:
    """MAR's sampling with a head that denoises every unknown token in every iteration."""
    order, noise = draws["order"], draws["noise"]
    diffusion, classes = (
        model.diffusion.respaced(options.respace(1000)),
        model.embed_classes(options.guidance.conditions(condition)),
    )
    tokens, before = torch.zeros(BATCH, model.length, model.token_dim), model.length
    for left in masks_left(model.length, options.num_iter):
        scale = options.guidance.weights(model.length - max(left, 1), model.length + 1)[0]
        visible, unknown = order[:, before:].sort(1).values.repeat(2, 1), order[:, :before]
        z = model.decode(model.encode(tokens.repeat(2, 1, 1), visible, classes), visible)
        rows = model.head.condition(take(z, unknown.repeat(2, 1))).flatten(0, 1)

        def network(x: Tensor, t: int, rows=rows, scale=scale) -> Tensor:
            given, null = model.head(x.repeat(2, 1), torch.tensor([t]), rows).chunk(2)
            eps, eps_null = given[:, : model.token_dim], null[:, : model.token_dim]
            return torch.cat([eps_null + scale * (eps - eps_null), given[:, model.token_dim :]], 1)

        first, *others = (take(step, unknown).flatten(0, 1) for step in noise.unbind(1))
        *_, state = diffusion.ancestral(network, first, others)
        drawn, chosen = state.x.view(BATCH, before, -1)[:, left:], unknown[:, left:]
        tokens = tokens.scatter(1, chosen[..., None].expand_as(drawn), drawn)
        before = left
    return model.ungroup(tokens)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """A context that records the number of input vectors in each call of ``module``."""
    sizes: list[int] = []
    hook = module.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[:-1].numel()))
    try:
        yield sizes
    finally:
        hook.remove()


def measure(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds per image of each run; runs alternate."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) / BATCH for name, values in taken.items()}


def compare(
    name: str, model: ContinuousGenerator, options, recomputed: Callable, parts: dict[str, nn.Module], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The ratio and the figures of one model; ``parts`` are the modules whose calls are counted."""
    condition = Condition.from_labels(torch.arange(BATCH))
    draws = model.sampling_draws(Keys.range(0, BATCH), options)
    arguments = (condition, options)
    runs = {
        "sampled": lambda: model.sample(*arguments, draws=draws),
        "recomputed": lambda: recomputed(model, *arguments, draws),
    }
    with ExitStack() as stack:
        sizes = {part: stack.enter_context(counted(module)) for part, module in parts.items()}
        sampled = runs["sampled"]()
    figures = {f"{part}_calls": len(counts) for part, counts in sizes.items()}
    figures |= {f"{part}_tokens_per_call": statistics.fmean(counts) / BATCH for part, counts in sizes.items()}
    error = (sampled - runs["recomputed"]()).abs().max().item()
    assert error < 1e-3 * sampled.abs().max(), f"{name}: the two samplers differ by {error:.1e}"
    took = measure(runs, repeats)
    say(f"{name}: {took['sampled']:.3f} s/image, recomputed {took['recomputed']:.3f} s/image, equal to {error:.1e}")
    figures |= {f"{name}_s_per_image": took["sampled"], f"{name}_s_per_image_recomputed": took["recomputed"]}
    return {f"{name}_recomputed_over_sampled": took["recomputed"] / took["sampled"]}, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    ratios, figures = compare_all(arguments.repeats)
    finish("sampling_continuous", ratios, {"threads": arguments.threads, "batch": BATCH} | figures)


def compare_all(repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures of both models."""
    xar, mar = build_xar(), build_mar()
    ratios, figures = {}, {"xar_steps": XAR_OPTIONS.num_steps}
    for compared in (
        ("xar", xar, XAR_OPTIONS, xar_recomputed, {"xar": xar.input}),
        ("mar", mar, MAR_OPTIONS, mar_recomputed, {"mar_transformer": mar.bridge, "mar_head": mar.head}),
    ):
        ratio, more = compare(*compared, repeats)
        ratios |= ratio
        figures |= more
    return ratios, figures


if __name__ == "__main__":
    main()
