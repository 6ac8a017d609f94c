"""Cost of the decodings of next-token generators (plain, jacobi, cautious), and likelihood of their images.

    python benchmarks/decodings.py quickstart/ --num 64
    python benchmarks/decodings.py runs/generator --thresholds 1,2,3 --trials 8

Reported for each: calls of the transformer after the condition, rows that it was fed in all, seconds, and the mean
log-likelihood of a token in nats under the unguided model. RUN is the run of a generator, or a folder with one in
``generator/``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import finish, say

from vistok.draws import Keys
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.pipelines import pipeline
from vistok.types import Condition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--num", type=int, default=64, help="images, in one batch")
    parser.add_argument("--thresholds", type=lambda text: [float(t) for t in text.split(",")], default=[1.0, 2.0, 3.0])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    arguments = parser.parse_args()
    inner = arguments.run / "generator"
    pipe = pipeline(inner if (inner / "pipeline.json").exists() else arguments.run)
    decodings: dict[str, dict[str, Any]] = {"plain": {}, "jacobi": {"decoding": "jacobi"}}
    for threshold in arguments.thresholds:
        options = {"decoding": "cautious", "entropy_threshold": threshold, "trials": arguments.trials}
        decodings[f"cautious_{threshold:g}"] = options
    ratios, figures = {}, {}
    for name, options in decodings.items():
        measured = measure(pipe.generator, arguments.num, options | {"guidance_scale": arguments.guidance_scale})
        figures |= {f"{key}_{name}": value for key, value in measured.items()}
        ratios[f"seconds_{name}_over_plain"] = measured["seconds"] / figures["seconds_plain"]
        say(f"{name:14} " + ", ".join(f"{key} {value:.4g}" for key, value in measured.items()))
    finish("decodings", ratios, figures | {"num": arguments.num, "trials": arguments.trials})


@torch.no_grad()
def measure(model: AutoregressiveGenerator, num: int, sampling: dict[str, Any]) -> dict[str, float]:
    """Sample ``num`` images whose classes alternate."""
    options = model.options_type(**sampling)
    classes = model.num_classes
    condition = Condition.none(num) if classes is None else Condition.from_labels(torch.arange(num) % classes)
    draws = model.sampling_draws(Keys.range(0, num), options)
    fed: list[int] = []
    session = model.start(condition, options, draws=draws)
    network = session.network()
    original = network.transform

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        fed.append(len(x))
        return original(x, *rest)

    begin = time.perf_counter()
    session.network = lambda: _Counted(network, counted)
    for _ in session.generate():
        pass
    seconds = time.perf_counter() - begin
    logs = model.logits(session.tokens, condition).log_softmax(-1)
    likelihood = logs.gather(2, session.tokens[..., None]).mean().item()
    return {"calls": len(fed), "rows": sum(fed), "seconds": seconds, "likelihood": likelihood}


class _Counted:
    """A network whose ``transform`` is replaced by one that counts."""

    def __init__(self, network: Any, transform: Any):
        self._network, self.transform = network, transform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


if __name__ == "__main__":
    main()
