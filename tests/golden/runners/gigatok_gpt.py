"""Runners of GigaTok's autoregressive models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.generators.engine.sampling import DecodingOptions, filter_logits
from vistok.generators.llama import Llama
from vistok.guidance import Guidance, classifier_free, named
from vistok.guidance.schedules import WINDOWS
from vistok.types import Condition

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner

MODEL = "gigatok/gpt"


def _model(case: Case, step: Step) -> Llama:
    return case.build_model().train(step.args.get("train", case.build.get("train", False)))


def _condition(model: Llama, labels: Tensor) -> Condition:
    """The reference's null class is one more than there are classes."""
    return Condition.from_labels(torch.where(labels == model.num_classes, -1, labels))


@runner(MODEL, "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, loss="mean_cross_entropy")
    model = _model(case, step)
    output = model(step.tensor("ids", 0), _condition(model, step.tensor("cond_drop", 1)))
    return step.answers(output.prediction, output.loss)


@runner(MODEL, "probe")
@torch.no_grad()
def probe(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, pool="mean", label="null")
    model, ids = _model(case, step), step.tensor("ids", 0)
    return step.answers(model.hidden_states(ids, Condition.none(len(ids)), step.args["layer"]).mean(1))


@dataclass(frozen=True)
class _Scheduled(DecodingOptions):
    """Greedy decoding with a guidance scale for each token; later tokens are unguided."""

    scales: tuple[float, ...] = ()

    @property
    def guidance(self) -> Guidance:
        if all(scale == 1 for scale in self.scales):
            return classifier_free(1.0)
        return classifier_free(lambda step, steps: self.scales[step] if step < len(self.scales) else 1.0)


def _scales(step: Step) -> tuple[float, ...]:
    args, steps = step.args, step.args["num_tokens"]
    name, scale = args.get("guidance_schedule", "constant"), args.get("guidance_scale", 1.0)
    if scale <= 1:  # the reference turns guidance off
        return (1.0,) * steps
    window = None
    if name in WINDOWS:
        start, stop = WINDOWS[name]
        window = (args.get("window_start", start), args.get("window_stop", args.get("window_end", stop)))
    schedule = named({"linear": "linear_ratio"}.get(name, name), scale, window=window)
    scales = [schedule(i, steps) for i in range(steps)]
    interval = args.get("guidance_interval", -1)  # the last loop index that is guided; the loop begins at token 1
    guided = steps if interval is None or interval < 0 else interval + 2
    if args.get("guided_tokens", min(guided, steps)) != min(guided, steps):
        raise GoldenFailure(f"{step.id}: guided_tokens {args['guided_tokens']} contradict guidance_interval {interval}")
    return (*scales[:guided], *[1.0] * (steps - guided))


@runner(MODEL, "generate")
def generate(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, null_label="num_classes")
    if not step.args["greedy"] and step.args.get("top_k") != 1:
        raise GoldenFailure(f"{step.id}: the answer of random sampling depends on the reference's random numbers")
    model, options = _model(case, step), _Scheduled(temperature=0.0, scales=_scales(step))
    session = model.start(_condition(model, step.tensor("cond", 0)), options)
    for _ in session.generate(step.args["num_tokens"]):
        pass
    return step.answers(session.tokens)


@runner(MODEL, "filter_probs")
def filter_probs(case: Case, step: Step) -> dict[str, Tensor]:
    logits = step.tensor("raw_logits", 0)
    return {
        name: filter_logits(
            logits[:, settings.get("position", -1)],
            temperature=settings.get("temperature", 1.0),
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
        ).softmax(-1)
        for name, settings in step.args.items()
        if name in step.outputs
    }
