"""Runners of Infinity's multi-scale binary spherical quantizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.losses.bits import bit_accuracy, bit_cross_entropy
from vistok.quantizers.bsq import MultiScaleBSQ

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner


def _quantizer(case: Case, step: Step) -> MultiScaleBSQ:
    config = dict(case.config)
    dim = config.pop("dim")
    decay = config.pop("use_decay_factor", False)
    known = {"codebook_size": 2**dim, "new_quant": True, "schedule_mode": "dynamic"}
    for key, value in config.items():
        if known.get(key, object()) != value:
            raise GoldenFailure(f"{case.label}: {key} {value!r} is not computed")
    return MultiScaleBSQ(dim, step.args["scale_schedule"], decay=decay)


@runner("infinity/quantizer", "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer, x = _quantizer(case, step), step.tensor("x", 0)
    output = quantizer(x)
    assert torch.equal(quantizer.encode(x), output.ids)
    return step.answers(output.quantized, output.ids.to(torch.uint8))


@runner("infinity/quantizer", "near_zero")
def near_zero(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer, threshold = _quantizer(case, step), step.args["threshold"]
    if isinstance(threshold, str):
        number, _, rest = threshold.partition(" / ")
        if rest != "sqrt(d)":
            raise GoldenFailure(f"{step.id}: threshold {threshold!r} is not understood")
        threshold = float(number) / math.sqrt(quantizer.dim)
    return step.answers(quantizer.near_zero(step.tensor("x", 0), threshold))


@runner("infinity/quantizer", "var_inputs")
@torch.no_grad()
def inputs_of_map(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer = _quantizer(case, step)
    bits = quantizer.encode(step.tensor("x", 0))
    resize, patch = step.args.get("resize", "area"), step.args.get("patchify", 1)
    return step.answers(quantizer.next_inputs(bits, resize=resize, patch=patch))


@runner("infinity/quantizer", "next_inputs")
@torch.no_grad()
def next_inputs(case: Case, step: Step) -> dict[str, Tensor]:
    resize, patch = step.args.get("resize", "trilinear"), step.args.get("patchify", 1)
    return step.answers(_quantizer(case, step).next_inputs(step.tensor("bits", 0), resize=resize, patch=patch))


@runner("infinity/quantizer", "lookup")
@torch.no_grad()
def lookup(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_quantizer(case, step).decode(step.tensor("bits", 0)))


@runner("infinity/quantizer", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, of="sum(quant * g)")
    x = step.tensor("x", 0).requires_grad_()
    value = (_quantizer(case, step)(x).quantized * step.tensor("g", 1)).sum()
    if set(step.args["wrt"].values()) != {"(x)"}:
        raise GoldenFailure(f"{step.id}: only the gradient of (x) is computed")
    return {output: torch.autograd.grad(value, x, retain_graph=True)[0] for output in step.args["wrt"]}


@runner("infinity/quantizer", "self_correct")
def self_correct(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer, args = _quantizer(case, step), step.args
    strengths = torch.zeros(len(quantizer.scales))
    count = min(max(args["noise_layers"], 0), len(strengths))
    given = torch.tensor(args["strengths_percent"], dtype=torch.float64)[:count] * 0.01
    strengths[: len(given)] = given.float()
    found = quantizer.self_correct(
        step.tensor("x", 0),
        step.tensor("flip_u", 1),
        strengths,
        requantize=args.get("requantize", True),
        patch=args.get("patchify", 1),
    )
    return step.answers(found.inputs, found.targets.to(torch.uint8))


@runner("infinity/quantizer", "bit_loss")
def bit_loss(case: Case, step: Step) -> dict[str, Tensor]:
    scales = step.args["scale_schedule"] if step.args.get("reweight_by_scale", False) else None
    return step.answers(bit_cross_entropy(step.tensor("bit_logits", 0), step.tensor("bits", 1), scales))


@runner("infinity/quantizer", "bit_accuracy")
def accuracy(case: Case, step: Step) -> dict[str, Tensor]:
    bits, positions = bit_accuracy(step.tensor("bit_logits", 0), step.tensor("bits", 1))
    return step.answers(100 * bits, 100 * positions)
