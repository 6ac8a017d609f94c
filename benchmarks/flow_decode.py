"""Guided decoding of FlexTok in batches, against the scheme of its reference implementation.

    python benchmarks/flow_decode.py --threads 2

The reference packs the samples of a batch into one sequence, separates them by a dense mask, and runs the guided and
the unguided samples one after the other. vistok makes all of them rows of one batch, which needs no mask. The packed
scheme is rebuilt below from the same modules and weights; the script checks that both give the same latents. In a
packed batch of four only a quarter of the attention logits is used, so the ratio grows with the batch. The reference
can skip the others on a GPU, where it compiles its attention for the mask; on a GPU a compiled decoder is timed here,
too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import finish, say, use_threads
from torch import Tensor
from torch.nn import functional as F

from vistok.flow import LinearPath, euler, last
from vistok.nn.attention import attend
from vistok.nn.modulation import modulate
from vistok.tokenizers.flextok.networks import FlowDecoder, TrunkConfig, denoise

SIZES = {"tiny": (192, 4), "small": (384, 8), "d12": (768, 12), "d18": (1152, 18), "d28": (1792, 28)}
GRID, TOKENS, CODE_DIM, CHANNELS = 16, 256, 6, 16
SCALE = 3.0


def build(size: str) -> FlowDecoder:
    """A decoder of the released shape at some width, with random modulation; its initial zeros would hide mistakes."""
    dim, depth = SIZES[size]
    torch.manual_seed(0)
    decoder = FlowDecoder(TrunkConfig(dim, depth), CHANNELS, (2, 2), (GRID, GRID), TOKENS, CODE_DIM)
    for module in (*(block.modulation for block in decoder.blocks), decoder.modulation, decoder.to_patches):
        torch.nn.init.normal_(module.weight, std=0.02)
    return decoder.eval()


def packed_velocity(decoder: FlowDecoder, noisy: Tensor, t: float, registers: Tensor) -> Tensor:
    """The velocity (B, C, h, w) with the batch packed into one sequence of B * (P + N) positions."""
    batch, count = len(noisy), registers.shape[1]
    x = decoder.embed(noisy, registers)
    length = x.shape[1]
    sample = torch.arange(batch, device=x.device).repeat_interleave(length)
    mask = sample[:, None] == sample
    time = decoder.time_embedding(torch.full((batch,), t, device=x.device))
    embedding = F.silu(time)[sample]  # one time embedding per position
    stream = (torch.arange(length, device=x.device) >= length - count).long().repeat(batch)
    x = x.flatten(0, 1)[None]
    for block in decoder.blocks:
        modulation = block.modulation(embedding).unflatten(-1, (2, 6, -1))  # for both streams, at every position
        modulation = modulation[torch.arange(len(stream), device=x.device), stream]
        gate1, gate2, shift1, scale1, shift2, scale2 = modulation.unbind(1)
        x = x + gate1 * attention(block, modulate(block.norm1(x), shift1, scale1), mask)
        x = x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))
    patches = decoder.norm(x.view(batch, length, -1)[:, :-count])
    shift, scale = decoder.modulation(F.silu(time))[:, None].chunk(2, -1)
    patches = decoder.to_patches(modulate(patches, shift, scale)).unflatten(1, (GRID, GRID))
    return patches.unflatten(-1, (2, 2, CHANNELS)).permute(0, 5, 1, 3, 2, 4).reshape(noisy.shape)


def attention(block, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return block.attn.out(attend(block.attn.q_norm(q), block.attn.k_norm(k), v, mask=mask, scale=block.attn.scale))


def packed_decode(decoder: FlowDecoder, codes: Tensor, lengths: Tensor, noise: Tensor, num_steps: int) -> Tensor:
    """The reference's scheme: two passes over the packed batch in every step."""
    null = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    conditional, empty = (decoder.embed_codes(codes, lengths, rows) for rows in (null, ~null))

    def velocity(x: Tensor, t: float) -> Tensor:
        guided, free = (packed_velocity(decoder, x.to(codes.dtype), t, registers) for registers in (conditional, empty))
        return free.float() + SCALE * (guided.float() - free.float())

    return last(euler(velocity, noise, LinearPath().times(num_steps))).x


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default=None, help="tiny on a CPU, d18 on a GPU by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None, help="Euler steps per image; 3 on a CPU, 20 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    size, steps = arguments.size or ("d18" if on_gpu else "tiny"), arguments.steps or (20 if on_gpu else 3)
    dtype = torch.bfloat16 if on_gpu else torch.float32

    decoder = build(size).to(device)
    codes = torch.rand(arguments.batch, TOKENS, CODE_DIM, device=device) * 2 - 1
    noise = torch.randn(arguments.batch, CHANNELS, 2 * GRID, 2 * GRID, device=device)
    lengths = torch.tensor([TOKENS >> (2 * i % 9) for i in range(arguments.batch)], device=device)
    options = {"num_steps": steps, "guidance_scale": SCALE}

    batched = last(denoise(decoder, codes, lengths, noise, **options)).x
    packed = packed_decode(decoder, codes, lengths, noise, steps)
    error = (batched - packed).abs().max().item()
    say(f"both schemes agree to {error:.1e}")
    assert error < 1e-2 * packed.abs().max(), "the two schemes differ"

    decoder, codes = decoder.to(dtype), codes.to(dtype)
    runs = {
        "batched": lambda: last(denoise(decoder, codes, lengths, noise, **options)).x,
        "packed": lambda: packed_decode(decoder, codes, lengths, noise, steps),
    }
    if on_gpu:
        compiled = torch.compile(decoder)
        compiled.condition = decoder.condition
        runs["compiled"] = lambda: last(denoise(compiled, codes, lengths, noise, **options)).x
    for run in runs.values():
        run()
    # The two alternate, so that a busy machine slows both alike.
    measured = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(arguments.repeats)]
    median = {name: statistics.median(row[name] for row in measured) for name in runs}
    for name, value in median.items():
        say(f"{name:9} {value:7.3f} s for {arguments.batch} images, {arguments.batch / value:.3f} images/s")
    ratios = {f"packed_over_{name}": median["packed"] / value for name, value in median.items() if name != "packed"}
    figures = {f"{name}_images_per_second": arguments.batch / value for name, value in median.items()}
    figures |= {"size": size, "batch": arguments.batch, "steps": steps, "max_difference": f"{error:.1e}"}
    figures |= {"device": torch.cuda.get_device_name() if on_gpu else f"cpu, {arguments.threads} threads"}
    finish("flow_decode", ratios, figures)


if __name__ == "__main__":
    main()
