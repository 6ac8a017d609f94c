"""Runners of the generators of Open-MAGVIT2 and IBQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints import rename
from vistok.generators import ibq_gpt, open_magvit2_gpt
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.llama import Llama
from vistok.generators.open_magvit2_gpt.sampling import SubTokenOptions
from vistok.types import Condition, GeneratorOutput

from ..expressions import gradients, named
from ..harness import Case, GoldenFailure, Step, runner

SUB_TOKENS, WHOLE = "magvit2/gpt", "ibq/gpt"
RULES = {SUB_TOKENS: open_magvit2_gpt.official.OFFICIAL_NAMES, WHOLE: ibq_gpt.model.OFFICIAL_NAMES}


def _model(case: Case, step: Step) -> Llama:
    return case.build_model().train(step.args.get("train", False))


def _condition(model: Llama, labels: Tensor) -> Condition:
    """The reference's null class is one more than there are classes."""
    return Condition.from_labels(torch.where(labels == model.num_classes, -1, labels))


def _ids(case: Case, step: Step, model: Llama) -> tuple[Tensor, int]:
    """Ids (B, N), and how many inputs they took."""
    if case.model == WHOLE:
        return step.tensor("ids", 0).long(), 1
    return model.join_ids([step.tensor("ids_pre", 0).long(), step.tensor("ids_post", 1).long()]), 2


def _named(case: Case, parts: Sequence[Tensor], what: str) -> dict[str, Tensor]:
    """A tensor of each part of an id, by the name that it has in answers."""
    return {what: parts[0]} if case.model == WHOLE else {f"{what}_pre": parts[0], f"{what}_post": parts[1]}


def _parts(case: Case, model: Llama, logits: Tensor) -> Sequence[Tensor]:
    return [logits] if case.model == WHOLE else logits.split(model.sub_tokens.sizes, -1)


def _output(case: Case, step: Step) -> tuple[Llama, GeneratorOutput]:
    model = _model(case, step)
    ids, count = _ids(case, step, model)
    condition = _condition(model, step.tensor("label", count))
    if len(step.inputs) > count + 1:
        condition = condition.drop(step.tensor("drop_u", count + 1) < step.args["class_dropout_prob"])
    return model, model(ids, condition)


def _losses(case: Case, output: GeneratorOutput) -> dict[str, Tensor]:
    losses = {"loss": output.loss}
    if case.model == SUB_TOKENS:
        losses |= {"loss_pre": output.metrics["loss_0"], "loss_post": output.metrics["loss_1"]}
    return losses


def _both(op: str):
    def register(function):
        for model in (SUB_TOKENS, WHOLE):
            runner(model, op)(function)
        return function

    return register


@_both("logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    ids, count = _ids(case, step, model)
    predicted = model.logits(ids, _condition(model, step.tensor("label", count)))
    return named(step, _named(case, _parts(case, model, predicted), "logits"))


@_both("loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, _losses(case, _output(case, step)[1]))


@_both("gradients")
def parameter_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    model, output = _output(case, step)
    parameters, rules = dict(model.named_parameters()), RULES[case.model]
    tensors = {key: parameters[next(iter(rename({key: torch.empty(0)}, rules)))] for key in step.args["wrt"].values()}
    return gradients(step, _losses(case, output), step.args["of"], tensors)


def _settings(case: Case, args: dict[str, Any], part: int) -> dict[str, Any]:
    """The reference's options of a part of an id. It turns guidance off at 1 and below."""

    def of(name: str, default: Any) -> Any:
        value = args.get(name, default)
        return value[part] if isinstance(value, list) else value

    return {
        "temperature": 0.0 if args["greedy"] else float(of("temperature", 1.0)),
        "top_k": of("top_k", 0) or 0,
        "top_p": 1.0 if of("top_p", 1.0) is None else of("top_p", 1.0),
        "guidance_scale": max(float(of("guidance_scale", 1.0)), 1.0),
    }


@_both("generate")
@torch.no_grad()
def generate(case: Case, step: Step) -> dict[str, Tensor]:
    model, args = _model(case, step), step.args
    first = _settings(case, args, 0)
    if not args["greedy"] and first["top_k"] != 1:
        raise GoldenFailure(f"{step.id}: the answer of random sampling depends on the reference's random numbers")
    if first["top_k"] == 1:
        first["temperature"] = 0.0
    options = DecodingOptions(**first)
    if case.model == SUB_TOKENS:
        later = _settings(case, args, 1)
        if later["top_k"] == 1:
            later["temperature"] = 0.0
        options = SubTokenOptions(**first, **{f"later_{name}": value for name, value in later.items()})
    labels = step.tensor("label", 0)
    null = args.get("null_label", model.num_classes)
    condition = Condition.from_labels(torch.where(labels == null, -1, labels))
    session, guided = model.start(condition, options), []
    for _ in range(args.get("num_tokens", model.spec.length)):
        parts: list[Tensor] = []
        seen = []
        for _ in range(model.num_parts):
            seen.append(session.next_logits(parts))
            parts.append(seen[-1].argmax(-1))
        guided.append(seen)
        session.commit(parts)
    sampled = model.start(condition, options)
    for _ in sampled.generate(args.get("num_tokens", model.spec.length)):
        pass
    if not torch.equal(sampled.tokens, session.tokens):
        raise GoldenFailure(f"{step.id}: streamed ids differ from those of single steps")
    columns = [torch.cat(column, 1) for column in zip(*guided)]
    answers = _named(case, model.split_ids(sampled.tokens), "ids") | _named(case, columns, "logits")
    return named(step, answers)
