"""Training steps per second, and the share of the machine's matrix product rate that they reach.

The rate is measured in the same run, alternating with the steps, by square matrix products of the same dtype. A step is
draws, forward, backward, clipping and AdamW on random data; its operations are those that torch counts in forward and
backward. ``draws_share`` is the share of a step's time that its draws take.

    python benchmarks/training.py --model llama_b --batch-size 8
    python benchmarks/training.py --model vit_vqgan_small --batch-size 4

On a GPU: ``--device cuda --dtype bf16 --compile --batch-size 64 --matrix 8192``.

    python benchmarks/training.py --recipe moving_digits/larp_tokenizer

reports how the time of a step of the training loop is spent, with the recipe's own data: the shares of data, draws,
forward, backward, optimizer, logging (with the row written every ``training.log_every`` steps) and the rest.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import finish, say, use_threads
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vistok.config import load_config
from vistok.draws import Draws, Keys, draws_on
from vistok.generators.llama import Llama
from vistok.generators.mar import MAR
from vistok.generators.xar import XAR
from vistok.tokenizers.dar import DAR
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.tokenizers.vit_vqgan import ViTVQGAN
from vistok.train.profile import profile
from vistok.types import Condition, TokenSpec
from vistok.utils.devices import DTYPES
from vistok.utils.recipes import find_recipe


class Workload(NamedTuple):
    """A model with the loss of one random batch.

    Attributes:
        loss: function from the draws of a step to its loss.
        draws: function from the keys of a step to its draws.
        batch: number of samples in the batch.
        units: number of images or tokens that one step trains on.
        unit: name of the units.
    """

    model: nn.Module
    loss: Callable[[Draws], Tensor]
    draws: Callable[[Keys], Draws]
    batch: int
    units: int
    unit: str


def generator(size: str, batch: int, device: str, length: int = 256) -> Workload:
    """LlamaGen's GPT on tokens of 256 px images."""
    side = int(length**0.5)
    model = Llama(TokenSpec(length, 16384, dim=8, grid=(side, side)), num_classes=1000, **Llama.sizes[size])
    model.train().to(device)
    tokens = torch.randint(16384, (batch, length), device=device)
    labels = Condition.from_labels(torch.zeros(batch, dtype=torch.int64, device=device))
    return Workload(
        model,
        lambda draws: model(tokens, labels, draws=draws).loss,
        model.training_draws,
        batch,
        batch * length,
        "tokens",
    )


def continuous(model: nn.Module, batch: int, device: str) -> Workload:
    """A generator on random latents."""
    model.train().to(device)
    latents = torch.randn(batch, model.spec.length, model.spec.dim, device=device)
    labels = Condition.from_labels(torch.zeros(batch, dtype=torch.int64, device=device))
    return Workload(
        model,
        lambda draws: model(latents, labels, draws=draws).loss,
        model.training_draws,
        batch,
        batch * model.spec.length,
        "tokens",
    )


def tokenizer(model: nn.Module, batch: int, device: str) -> Workload:
    """Squared error and code losses of a tokenizer of 256 px images."""
    model.train().to(device)
    pixels = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1

    def loss(draws: Draws) -> Tensor:
        output = model(pixels, draws=draws)
        return (output.reconstruction - pixels).square().mean() + sum(term.mean() for term in output.losses.values())

    return Workload(model, loss, model.training_draws, batch, batch, "images")


WORKLOADS: dict[str, Callable[[int, str], Workload]] = {
    "llama_b": lambda batch, device: generator("B", batch, device),
    "llama_l": lambda batch, device: generator("L", batch, device),
    "llama_xl": lambda batch, device: generator("XL", batch, device),
    "vit_vqgan_small": lambda batch, device: tokenizer(ViTVQGAN(**ViTVQGAN.sizes["small"]), batch, device),
    "vit_vqgan_base": lambda batch, device: tokenizer(ViTVQGAN(**ViTVQGAN.sizes["base"]), batch, device),
    "llamagen_vq": lambda batch, device: tokenizer(LlamaGenVQ(), batch, device),
    "dar": lambda batch, device: tokenizer(DAR(), batch, device),
    "mar_base": lambda batch, device: continuous(MAR(KL16, num_classes=1000, **MAR.sizes["base"]), batch, device),
    "xar_base": lambda batch, device: continuous(XAR(KL16, num_classes=1000, **XAR.sizes["base"]), batch, device),
}
KL16 = TokenSpec(256, None, dim=16, grid=(16, 16))


class Step:
    """One optimisation step of a workload, as the training loop does it."""

    def __init__(self, workload: Workload, device: str, dtype: torch.dtype):
        self.workload, self.device, self.dtype = workload, device, dtype
        self.optimizer = torch.optim.AdamW(workload.model.parameters(), fused=device != "cpu")
        self.number = 0

    def draws(self) -> Draws:
        """The draws of the next step."""
        self.number += 1
        device = torch.device(self.device)
        return draws_on(self.workload.draws(Keys.range(0, self.workload.batch, step=self.number).on(device)), device)

    def draw(self) -> float:
        """Make the draws of a step; returns the seconds."""
        begin = time.perf_counter()
        self.draws()
        synchronise(self.device)
        return time.perf_counter() - begin

    def __call__(self) -> float:
        """Run a step; returns the seconds."""
        begin = time.perf_counter()
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.workload.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronise(self.device)
        return time.perf_counter() - begin

    def gradients(self) -> None:
        kind = torch.device(self.device).type
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.workload.loss(self.draws())
        loss.backward()

    def operations(self) -> int:
        """Floating-point operations of forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.gradients()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def matmul_rate(side: int, device: str, dtype: torch.dtype) -> float:
    """Operations per second of one product of two square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    synchronise(device)
    begin = time.perf_counter()
    a @ b
    synchronise(device)
    return 2 * side**3 / (time.perf_counter() - begin)


def synchronise(device: str | torch.device) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: str) -> float:
    """Peak memory in GiB: of the device, or on a CPU of the whole process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def shares_of(recipe: str, overrides: list[str]) -> None:
    """Print the shares of a step of the training loop."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(find_recipe(recipe), [*overrides, f"output_dir={folder}/run"])
        found = profile(config)
    shares = {f"{phase.replace(' ', '_')}_share": part / found.step_seconds for phase, part in found.seconds.items()}
    figures = {"ms_per_step": 1000 * found.step_seconds, found.unit: found.units_per_second}
    finish("training", shares, figures | {"recipe": recipe})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=WORKLOADS, default="llama_b")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after two that warm up")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast, as in training")
    parser.add_argument("--matrix", type=int, default=2048, help="side of the matrices that measure the machine")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recipe", help="in place of a model: a shipped config or a file, whose loop is measured")
    parser.add_argument("overrides", nargs="*", help="of the recipe, as key=value")
    arguments = parser.parse_args()
    if arguments.threads:
        use_threads(arguments.threads)
    if arguments.recipe:
        shares_of(arguments.recipe, arguments.overrides)
        return
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    torch.manual_seed(0)
    workload = WORKLOADS[arguments.model](arguments.batch_size, device)
    step = Step(workload, device, dtype)
    operations = step.operations()
    if arguments.compile:
        workload.model.compile()
    seconds, rates, drawing = [], [], []
    for number in range(arguments.steps + 2):
        rates.append(matmul_rate(arguments.matrix, device, dtype))
        drawing.append(step.draw())
        seconds.append(step())
        share = drawing[-1] / seconds[-1]
        say(f"step {number}: {seconds[-1]:.3f} s, draws {share:.2%}; matrix products {rates[-1] / 1e9:,.0f} GFLOP/s")
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    second, rate = statistics.median(seconds[2:]), statistics.median(rates[2:])
    finish(
        "training",
        {"of_matmul_rate": operations / second / rate},
        {
            f"{workload.unit}_per_second": workload.units / second,
            "ms_per_step": 1000 * second,
            "draws_share": statistics.median(drawing[2:]) / second,
            "operations_per_step": float(operations),
            "matmul_gflops": rate / 1e9,
            "peak_memory_gib": peak_memory(device),
            "parameters": sum(p.numel() for p in workload.model.parameters()),
            "model": arguments.model,
            "batch_size": arguments.batch_size,
            "dtype": arguments.dtype,
            "device": machine,
        },
    )


if __name__ == "__main__":
    main()
