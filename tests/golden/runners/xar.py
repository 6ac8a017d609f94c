"""Runners of xAR. Golden latents are maps (B, C, h, w); entities are the layout's, whatever their size."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

import vistok
from vistok.draws import Draws
from vistok.generators.xar.model import XAR
from vistok.generators.xar.sampling import XAROptions
from vistok.types import Condition

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case, step: Step) -> XAR:
    casts = case.build.get("cast", {})
    state = {key: t.to(getattr(torch, casts[key])) if key in casts else t for key, t in case.state.items()}
    model = case.once("model", lambda: vistok.from_official(case.model, case.config, state))
    return model.train(step.args.get("train", False))


def _tokens(latent: Tensor) -> Tensor:
    return rearrange(latent, "b d h w -> b (h w) d")


def _training_input(model: XAR, step: Step) -> tuple[Tensor, Tensor]:
    """The noisy sequence (B, N, D) and the times (B, E)."""
    sequence, times = model.layout.to_sequence(_tokens(step.case.tensor("latent"))), step.case.tensor("t")
    return model.noisy(sequence, step.case.tensor("noise").flatten(1, 2), times), times


def _condition(model: XAR, step: Step) -> Condition:
    """The class labels; the one behind the last class is the null class, in training and in sampling."""
    labels = step.case.tensor("label")
    condition = Condition.from_labels(torch.where(labels == model.num_classes, -1, labels))
    return condition.drop(step.case.tensor("drop").bool()) if step.has("drop") else condition


@runner("xar/generator", "model_input")
@torch.no_grad()
def model_input(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_training_input(_model(case, step), step)[0])


@runner("xar/generator", "time_embed")
@torch.no_grad()
def time_embed(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_model(case, step).embed_times(step.tensor("t", 0)))


@runner("xar/generator", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    model, seen = _model(case, step), []
    hook = model.encoder_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model.velocity(*_training_input(model, step), _condition(model, step))
    hook.remove()
    return step.answers(seen[0])


@runner("xar/generator", "velocity")
@torch.no_grad()
def velocity(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    return step.answers(model.velocity(*_training_input(model, step), _condition(model, step)))


@runner("xar/generator", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    draws = {"noise": case.tensor("noise").flatten(1, 2), "time": case.tensor("t")}
    model = _model(case, step)
    output = model(_tokens(case.tensor("latent")), _condition(model, step), draws=draws)
    return step.answers(output.loss)


def _options(step: Step) -> XAROptions:
    args = step.args
    schedules = {"linear_cells": "linear", "constant": "constant"}
    if args.get("guidance_schedule", "linear_cells") not in schedules:
        raise GoldenFailure(f"{step.id}: guidance_schedule {args['guidance_schedule']!r} is not computed")
    return XAROptions(
        num_steps=args["num_steps"],
        solver=args["solver"],
        guidance_scale=max(args["guidance_scale"], 1.0),  # the reference guides only above 1
        guidance_schedule=schedules[args.get("guidance_schedule", "linear_cells")],
    )


def _draws(step: Step) -> Draws:
    """The stored noise (E, B, n, D) and eps (E, steps, B, n, D), with the batch first."""
    draws = {"noise": rearrange(step.tensor("noise", 1), "e b n d -> b (e n) d")}
    if step.has("eps"):
        draws["steps"] = rearrange(step.tensor("eps", 2), "e s b n d -> b s (e n) d")
    return draws


@runner("xar/generator", "sample")
def sample(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    tokens = model.sample(_condition(model, step), _options(step), draws=_draws(step))
    latent = rearrange(tokens, "b (h w) d -> b d h w", h=model.spec.grid[0])
    return step.answers(latent / step.args.get("latent_scale", 1.0))


@runner("xar/generator", "sample_velocity")
@torch.no_grad()
def sample_velocity(case: Case, step: Step) -> dict[str, Tensor]:
    """What the network gave at one call of one cell: conditional and null rows."""
    model, options = _model(case, step), _options(step)
    condition = _condition(model, step)
    cell, size = step.args["cell"], model.layout.sizes[step.args["cell"]]
    inputs, outputs = [], []
    hooks = [
        model.input.register_forward_hook(lambda module, args, output: inputs.append(args[0][:, -size:])),
        model.output.register_forward_hook(lambda module, args, output: outputs.append(output[:, -size:])),
    ]
    model.sample(condition, options, draws=_draws(step))
    for hook in hooks:
        hook.remove()
    call = cell * options.num_steps + step.args["step"]
    conditional, *null = outputs[call].chunk(2 if len(outputs[call]) > len(condition) else 1)
    if not null:  # an unguided cell has no null rows in the run
        if cell:
            raise GoldenFailure(f"{step.id}: null rows of an unguided later cell are not computed")
        times = torch.full((len(condition), 1), options.times()[step.args["step"]])
        null = [model.velocity(inputs[call], times, condition.null())]
    rows = {"conditional": conditional, "null": null[0]}
    return step.answers(torch.cat([rows[name] for name in step.args.get("rows", ("conditional", "null"))]))
