"""Runners of LPIPS."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.losses import LPIPS

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case) -> LPIPS:
    net = case.build.get("net", "vgg16")
    if net != "vgg16":
        raise GoldenFailure(f"{case.label}: LPIPS on {net!r} is not built, only on vgg16")
    return case.once(
        "lpips", lambda: LPIPS.from_official(case.config, case.state).train(case.build.get("train", False))
    )


def _images(case: Case, images: Tensor) -> Tensor:
    """Bring images from the case's range to [-1, 1]."""
    low, high = case.build.get("input_range", [-1, 1])
    return images if (low, high) == (-1, 1) else (images - low) / (high - low) * 2 - 1


@runner("eval/lpips", "features")
def features(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args["reduce"] != "mean_per_tap":
        raise GoldenFailure(f"{step.id}: unknown reduce {step.args['reduce']!r}")
    taps = _model(case).taps(_images(case, step.tensor(step.args["of"], 0)))
    return step.answers(torch.stack([taps[name].mean() for name in step.args["taps"]]))


@runner("eval/lpips", "lpips")
def lpips(case: Case, step: Step) -> dict[str, Tensor]:
    target, decoded = (_images(case, step.tensor(name, at)) for at, name in enumerate(("target", "decoded")))
    distances = _model(case)(decoded, target)
    reductions = {None: lambda x: x, "mean": torch.mean, "sum": torch.sum}
    return {name: reductions[settings["reduce"]](distances) for name, settings in step.args.items()}
