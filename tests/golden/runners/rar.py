"""Runners of RAR."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.checkpoints import rename
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.rar import RAR
from vistok.guidance.schedules import power_cosine
from vistok.types import Condition

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case, step: Step) -> RAR:
    return case.build_model().train(step.args.get("train", case.build.get("train", False)))


def _condition(step: Step, position: int) -> Condition:
    condition = Condition.from_labels(step.tensor("labels", position))
    if step.has("drop_mask") or len(step.inputs) > position + 1:
        condition = condition.drop(step.tensor("drop_mask", position + 1).bool())
    return condition


def _sequence(step: Step) -> tuple[Tensor, Tensor]:
    """The ids in the step's order, and that order."""
    ids = step.tensor("input_ids", 0)
    match step.args.get("order", "raster"):
        case "raster":
            orders = torch.arange(ids.shape[1]).expand(ids.shape)
        case "given":
            orders = step.tensor("orders", 3).long()
        case order:
            raise GoldenFailure(f"{step.id}: order {order!r} is not computed, only raster and given")
    return ids.gather(1, orders), orders


def _logits(case: Case, step: Step) -> tuple[Tensor, Tensor]:
    """Logits (B, L + 1, V), and the ids in order."""
    ids, orders = _sequence(step)
    condition = Condition.from_labels(step.tensor("labels", 1)).drop(step.tensor("drop_mask", 2).bool())
    return _model(case, step).logits_in_order(ids, orders, condition), ids


@runner("rar/generator", "condition_ids")
def condition_ids(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_model(case, step).class_rows(_condition(step, 0)))


@runner("rar/generator", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(*_logits(case, step))


@runner("rar/generator", "loss")
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    from vistok.generators.rar.official import OFFICIAL_NAMES

    predicted, ids = _logits(case, step)
    predicted = predicted[:, : predicted.shape[1] - step.args.get("shift", 1)]
    value = F.cross_entropy(predicted.transpose(1, 2), ids, reduction=step.args.get("reduction", "mean"))
    correct = (predicted.argmax(-1) == ids).float().mean()
    parameters = dict(_model(case, step).named_parameters())
    answers = step.answers(value, correct) if len(step.outputs) < 2 else dict(zip(step.outputs[:2], (value, correct)))
    for output, key in step.args.get("wrt", {}).items():
        (name,) = rename({key: torch.empty(0)}, OFFICIAL_NAMES)
        (gradient,) = torch.autograd.grad(value.sum(), parameters[name], retain_graph=True)
        answers[output] = gradient.norm() if step.args.get("reduce", {}).get(output) == "l2_norm" else gradient
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@runner("rar/generator", "schedule")
def schedule(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    if args.get("kind", "power_cosine") != "power_cosine":
        raise GoldenFailure(f"{step.id}: schedule {args['kind']!r} is not computed, only power_cosine")
    scale_at, steps = power_cosine(args["guidance_scale"], args["guidance_scale_pow"]), args["num_steps"]
    return step.answers(torch.tensor([scale_at(i, steps) for i in range(steps)]))


def _options(step: Step) -> DecodingOptions:
    args = step.args
    guided = args.get("guided", args.get("guidance_scale", 0.0) != 0)
    kind = args.get("guidance_schedule", "power_cosine")
    if guided and kind not in ("power_cosine", "constant"):
        raise GoldenFailure(f"{step.id}: guidance_schedule {kind!r} is not computed")
    rising = guided and kind == "power_cosine"
    return DecodingOptions(
        temperature=0.0 if args["greedy"] else args.get("temperature", 1.0),
        top_k=args.get("top_k", 0),
        top_p=args.get("top_p", 1.0),
        guidance_scale=args["guidance_scale"] if guided else 1.0,
        guidance_schedule="power-cosine" if rising else "constant",
        guidance_power=args.get("guidance_scale_pow", 0.0) if rising else None,
    )


def _sampled(model: RAR, step: Step, uniforms: Tensor | None, known=None) -> Tensor:
    condition = Condition.from_labels(step.tensor("labels", 0))
    draws = None if uniforms is None else {"ids": uniforms}
    session = model.start(condition, _options(step), draws=draws)
    if known is not None:
        session.force(*known)
    for _ in session.generate(step.args.get("num_steps", model.spec.length)):
        pass
    return session.tokens


def _log_probs(model: RAR, step: Step, tokens: Tensor) -> Tensor:
    """(B, L, V) after guidance and temperature, from one pass over the tokens."""
    condition, options = Condition.from_labels(step.tensor("labels", 0)), _options(step)
    logits = model.logits(tokens, condition)
    if options.guidance.is_on:
        null, length = model.logits(tokens, condition.null()), model.spec.length
        scales = torch.tensor([options.guidance.weights(i, length)[0] for i in range(length)])[:, None]
        logits = null + scales * (logits - null)
    return (logits / step.args.get("temperature", 1.0)).log_softmax(-1)


@runner("rar/generator", "generate")
@torch.no_grad()
def generate(case: Case, step: Step) -> dict[str, Tensor]:
    model, args = _model(case, step), step.args
    if not args["greedy"] and args.get("draw", "inverse_cdf") != "inverse_cdf":
        raise GoldenFailure(f"{step.id}: draw {args['draw']!r} is not computed, only inverse_cdf")
    uniforms = None if args["greedy"] else step.tensor("uniforms", 1).T
    values = {"tokens": _sampled(model, step, uniforms)}
    returns = args.get("returns", {})
    names = [returns.get(output, output) for output in step.outputs]
    if any(name == "log_probs" for name in names):
        values["log_probs"] = _log_probs(model, step, values["tokens"])
    return {
        output: values["log_probs" if name == "log_probs" else "tokens"] for output, name in zip(step.outputs, names)
    }


@runner("rar/generator", "generate_preserving")
@torch.no_grad()
def generate_preserving(case: Case, step: Step) -> dict[str, Tensor]:
    if not step.args["greedy"]:
        raise GoldenFailure(f"{step.id}: the answer of random sampling depends on the reference's random numbers")
    kept = step.tensor("uniforms", 2) < step.args["keep_probability"]
    return step.answers(_sampled(_model(case, step), step, None, (step.tensor("real_tokens", 1), kept)))
