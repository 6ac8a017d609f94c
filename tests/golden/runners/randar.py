"""Runners of RandAR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.generators.engine.queries import cosine_groups
from vistok.generators.randar.official import OFFICIAL_NAMES

from ..harness import Case, GoldenFailure, Step, runner
from ..queries import conditioned, gradients_of, guided_samples, orders


@runner("randar/gpt", "instruction_tokens")
@torch.no_grad()
def instruction_tokens(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(case.build_model().instructions(step.tensor("order", 0).long()))


@runner("randar/gpt", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    model, ids = case.build_model().train(step.args.get("train", False)), step.tensor("ids", 0).long()
    condition = conditioned(step, "class_dropout_prob", model)
    return step.answers(model.logits(ids, condition, orders(step, ids)))


def _loss(case: Case, step: Step) -> Tensor:
    model, ids = case.build_model().train(step.args.get("train", False)), step.tensor("ids", 0).long()
    condition = conditioned(step, "class_dropout_prob", model)
    return model(ids, condition, draws={"order": orders(step, ids)}).loss


@runner("randar/gpt", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_loss(case, step))


@runner("randar/gpt", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    return gradients_of(_loss(case, step), case.build_model(), step, OFFICIAL_NAMES)


@runner("randar/gpt", "group_sizes")
def group_sizes(case: Case, step: Step) -> dict[str, Tensor]:
    return {output: torch.tensor(_groups(step, step.args.get(output, step.args))) for output in step.outputs}


def _groups(step: Step, args: dict[str, Any]) -> tuple[int, ...]:
    if args.get("schedule", "cosine") != "cosine":
        raise GoldenFailure(f"{step.id}: schedule {args['schedule']!r} is not computed, only cosine")
    num_steps = args["num_tokens"] if args["num_steps"] == -1 else args["num_steps"]
    return cosine_groups(min(num_steps, args["num_tokens"]), args["num_tokens"])  # more steps are one by one, too


@runner("randar/gpt", "generate")
@torch.no_grad()
def generate(case: Case, step: Step) -> dict[str, Tensor]:
    args = dict(step.args)
    if "group_sizes" not in args:
        schedule = args.get("schedule", {})
        kind = {"schedule": schedule["kind"]} if "kind" in schedule else {}
        sizes = {"num_tokens": case.build_model().spec.length, "num_steps": args.get("num_steps", -1)}
        args["group_sizes"] = _groups(step, sizes | {k: v for k, v in schedule.items() if k in sizes} | kind)
    return guided_samples(case.build_model().eval(), step, args, rising="linear_tokens")
