"""Runners of the I3D port. Golden clips are uint8 (B, T, H, W, 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.checkpoints import load_strictly
from vistok.eval.i3d import InceptionI3D, preprocess

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner


def _network(case: Case) -> InceptionI3D:
    def build() -> InceptionI3D:
        if case.build.get("batch_norm_eps", 1e-5) != 1e-5:
            raise GoldenFailure(f"{case.label}: batch_norm_eps {case.build['batch_norm_eps']} is not I3D's")
        model = InceptionI3D(case.config.get("num_classes", 400), case.config.get("in_channels", 3))
        load_strictly(model, case.state)
        return model.requires_grad_(False)

    return case.once("i3d", build).eval()


def _clips(step: Step) -> Tensor:
    return step.tensor("video", 0).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)


@runner("eval/i3d", "preprocess")
def pixels(case: Case, step: Step) -> dict[str, Tensor]:
    return dict.fromkeys(step.outputs, preprocess(_clips(step), step.args.get("size", 224)))


@runner("eval/i3d", "end_points")
def end_points(case: Case, step: Step) -> dict[str, Tensor]:
    network, size = _network(case), step.args.get("size", 224)
    outputs = case.once(f"end points {step.inputs}", lambda: network.end_points(preprocess(_clips(step), size)))
    returns, axes = step.args.get("returns", {}), tuple(step.args["mean_over"])
    wanted = {name: returns.get(name, name) for name in step.outputs}
    if unknown := set(wanted.values()) - set(outputs):
        raise GoldenFailure(f"{step.id}: no end points {sorted(unknown)}; there are {', '.join(outputs)}")
    return {name: outputs[point].mean(axes) for name, point in wanted.items()}


@runner("eval/i3d", "features")
def features(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, train=False)
    with torch.no_grad():
        return step.answers(_network(case)(preprocess(_clips(step))))
