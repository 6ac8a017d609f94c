"""Runners of LARP's generators, class-conditional and for frame prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.generators.engine.sampling import filter_logits
from vistok.types import Condition

from ..decoding import generate, refuse
from ..harness import Case, GoldenFailure, Step, runner


def _condition(case: Case, step: Step) -> Condition:
    """Labels (B,), or the ids of the given frames (B, T), with the separator behind them or not."""
    given = step.tensor("condition", 0)
    if given.ndim == 1:
        return Condition.from_labels(given)
    model = case.build_model()
    if given.shape[1] == model.condition_length:
        if not bool((given[:, -1] == model.spec.codebook_size).all()):
            raise GoldenFailure(f"{step.id}: the condition does not end with the separator {model.spec.codebook_size}")
        given = given[:, :-1]
    return Condition.from_given(given)


@runner("larp/gpt", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, loss="mean_cross_entropy")
    if step.args.get("scored_from", "start") not in ("start", "separator"):
        raise GoldenFailure(f"{step.id}: unknown scored_from {step.args['scored_from']!r}")
    output = case.build_model()(step.tensor("tokens", 1), _condition(case, step))
    return step.answers(output.prediction, output.loss)


@runner("larp/gpt", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, loss="mean_cross_entropy_over_valid")
    model = case.build_model()
    return step.answers(model(step.tensor("tokens", 1), _condition(case, step), weights=step.tensor("valid", 2)).loss)


@runner("larp/gpt", "generate")
def generate_ids(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("null_label") is not None:
        refuse(step, null_label="num_classes")
    return step.answers(generate(case.build_model(), _condition(case, step), step))


@runner("larp/gpt", "filter_probs")
@torch.no_grad()
def filter_probs(case: Case, step: Step) -> dict[str, Tensor]:
    scores = case.build_model().logits(step.tensor("tokens", 1), _condition(case, step))
    return {
        name: filter_logits(
            scores[:, settings["position"]],
            temperature=settings["temperature"],
            top_k=settings["top_k"] or 0,
            top_p=settings["top_p"],
        ).softmax(-1)
        for name, settings in step.args.items()
    }
