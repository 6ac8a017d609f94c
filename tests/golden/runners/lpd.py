"""Runners of LPD."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.draws import Draws
from vistok.generators.lpd.locality import locality_order
from vistok.generators.lpd.model import group_numbers
from vistok.generators.lpd.official import OFFICIAL_NAMES

from ..harness import Case, Step, runner
from ..queries import conditioned, gradients_of, guided_samples, orders


def _draws(step: Step, ids: Tensor) -> Draws:
    groups = group_numbers(tuple(step.args["group_sizes"])).expand(ids.shape)
    return {"order": orders(step, ids), "groups": groups}


@runner("lpd/generator", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    model, ids = case.build_model().train(step.args.get("train", False)), step.tensor("ids", 0).long()
    condition, draws = conditioned(step, "label_drop_prob", model), _draws(step, ids)
    return step.answers(model.logits(ids, condition, draws["order"], groups=draws["groups"]))


def _loss(case: Case, step: Step) -> Tensor:
    model, ids = case.build_model().train(step.args.get("train", False)), step.tensor("ids", 0).long()
    condition = conditioned(step, "label_drop_prob", model)
    return model(ids, condition, draws=_draws(step, ids)).loss


@runner("lpd/generator", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_loss(case, step))


@runner("lpd/generator", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    return gradients_of(_loss(case, step), case.build_model(), step, OFFICIAL_NAMES)


@runner("lpd/generator", "generate")
@torch.no_grad()
def generate(case: Case, step: Step) -> dict[str, Tensor]:
    return guided_samples(case.build_model().eval(), step, step.args, rising="linear_per_token")


@runner("lpd/generator", "locality_order")
def order(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    side = args["grid"]
    places = locality_order(
        tuple(side) if isinstance(side, list) else (side, side),
        args["group_sizes"],
        int(step.case.tensor(step.inputs[0])),
        step.case.tensor(step.inputs[1]).numpy(),
        proximity_threshold=args["proximity_threshold"],
        repulsion_threshold=args["repulsion_threshold"],
    )
    return step.answers(torch.from_numpy(places))
