"""What the operations of generators with position queries have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints import rename
from vistok.generators.engine.queries import QueryGenerator
from vistok.types import Condition

from .harness import GoldenFailure, Step


def labelled(labels: Tensor, num_classes: int | None) -> Condition:
    """The labels; the reference's null class is one more than there are classes."""
    return Condition.from_labels(torch.where(labels == num_classes, -1, labels.long()))


def conditioned(step: Step, probability: str, model: QueryGenerator) -> Condition:
    """The labels, dropped where the step gives the draws, the last of its inputs."""
    condition = labelled(step.tensor("label", 1), model.num_classes)
    others = 2 if step.args.get("order") == "raster" else 3  # ids, labels, and orders
    if not step.has("drop_u") and len(step.inputs) <= others:
        return condition
    return condition.drop(step.tensor("drop_u", others) < step.args.get(probability, model.condition_dropout))


def orders(step: Step, ids: Tensor) -> Tensor:
    """The step's order (B, N) for ids (B, N)."""
    return orders_of(step, 2, tuple(ids.shape))


def orders_of(step: Step, position: int, shape: tuple[int, int]) -> Tensor:
    """The step's order of the shape (B, N), which is the input at ``position``."""
    match step.args.get("order", "given"):
        case "given":
            return step.tensor("order", position).long().expand(shape)
        case "raster":
            return torch.arange(shape[1]).expand(shape)
        case order:
            raise GoldenFailure(f"{step.id}: order {order!r} is not computed, only raster and a given one")


def gradients_of(
    loss: Tensor, model: torch.nn.Module, step: Step, rules: Iterable[tuple[str, str]]
) -> dict[str, Tensor]:
    """Gradients of the parameters that ``wrt`` names by the reference's keys."""
    if step.args.get("of", "loss") != "loss":
        raise GoldenFailure(f"{step.id}: gradients of {step.args['of']!r} are not computed, only of the loss")
    parameters, names = dict(model.named_parameters()), []
    for key in step.args["wrt"].values():
        (name,) = rename({key: torch.empty(0)}, rules)
        names.append(name)
    found = torch.autograd.grad(loss, [parameters[name] for name in names])
    return dict(zip(step.args["wrt"], found, strict=True))


def guided_samples(model: QueryGenerator, step: Step, args: Mapping[str, Any], rising: str) -> dict[str, Tensor]:
    """Ids in raster order and guided logits in the order of generation; ``rising`` is the schedule that rises."""
    if not args["greedy"] and args.get("top_k") != 1:
        raise GoldenFailure(f"{step.id}: the answer of random sampling depends on the reference's random numbers")
    scale, kind = args.get("guidance_scale", 1.0), args.get("guidance_schedule", "constant")
    if kind not in ("constant", rising):
        raise GoldenFailure(f"{step.id}: guidance_schedule {kind!r} is not computed, only constant and {rising}")
    first, last = scale if isinstance(scale, list) else (scale if kind == "constant" else 1.0, scale)
    options = model.options_type(
        temperature=0.0,
        guidance_scale=1.0 if last == 1.0 else (float(first), float(last)),  # the reference looks at the last
        guidance_schedule="linear-done",
        group_sizes=tuple(args["group_sizes"]),
    )
    condition = labelled(step.tensor("label", 0), model.num_classes)
    order = orders_of(step, 1, (len(condition), model.spec.length))
    session = model.start(condition, options, draws={"order": order})
    logits = []
    while session.step < len(session.plan):
        logits.append(session.next_logits().clone())
        session.commit([logits[-1].argmax(-1)])
    values = {"ids": session.tokens, "logits": torch.cat(logits, 1)}
    returns = args.get("returns", {})
    names = [returns.get(output, default) for output, default in zip(step.outputs, ("ids", "logits"), strict=False)]
    return {output: values[name] for output, name in zip(step.outputs, names, strict=True)}
