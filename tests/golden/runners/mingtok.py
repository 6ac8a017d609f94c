"""Runners of MingTok. Latents are (B, N or N + 1, C), the class latent last; pixels are in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.losses import L1
from vistok.tokenizers.mingtok import MingTok
from vistok.tokenizers.mingtok.networks import POSITION_OFFSET

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case, step: Step) -> MingTok:
    return case.build_model().train(step.args.get("train", case.build.get("train", False)))


def named(step: Step, values: Mapping[str, Any]) -> dict[str, Any]:
    """The step's outputs from quantities by name: an output's own, or that which ``returns`` maps it to."""
    returns, answers = step.args.get("returns", {}), {}
    for output in step.outputs:
        name = returns.get(output, output)
        if name not in values and len(values) == 1:
            name = next(iter(values))
        if name not in values:
            raise GoldenFailure(f"{step.id}: there is no quantity {name!r}; there are {', '.join(values)}")
        answers[output] = values[name]
    return answers


def check(step: Step, name: str, *allowed: Any) -> None:
    """Raise GoldenFailure if the step states another value of a setting than those computed."""
    if name in step.args and step.args[name] not in allowed:
        raise GoldenFailure(f"{step.id}: {name} {step.args[name]!r} is not computed, only {allowed}")


def _encoded(model: MingTok, image: Tensor) -> dict[str, Tensor]:
    model.check_pixels(image)
    tokens = model.encoder.embed(image)
    hidden = model.encoder.transform(tokens)
    raw = model.encoder.project(hidden)
    norm = model.scale.standardise(raw)
    return {"enc_tokens": tokens, "enc_hidden": hidden, "latent_raw": raw, "latent_norm": norm}


def _source(case: Case, step: Step, default: str) -> Tensor:
    """What ``from`` names: an output of an earlier step, an input, or a quantity of the image."""
    name = step.args.get("from", default)
    for earlier in case.steps[: step.index]:
        if name in earlier.outputs and (case.model, earlier.op) in OPERATIONS:
            return OPERATIONS[case.model, earlier.op](case, earlier)[name]
    given = step.tensor(name, 0)
    if given.ndim == 3:
        return given
    model = _model(case, step)
    values = _encoded(model, given)
    values["semantic"] = model.semantic_decoder(values["latent_raw"])[:, :-1]
    if name not in values:
        raise GoldenFailure(f"{step.id}: {name!r} is not computed; there are {', '.join(values)}")
    return values[name]


@runner("mingtok/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, _encoded(_model(case, step), step.tensor("image", 0)))


@runner("mingtok/tokenizer", "encode_resized")
@torch.no_grad()
def encode_resized(case: Case, step: Step) -> dict[str, Tensor]:
    check(step, "interpolation", "bicubic")
    check(step, "offset", POSITION_OFFSET)
    model = _model(case, step)
    values = _encoded(model, step.tensor("image_big", 0))
    features = model.semantic_decoder(values["latent_raw"])
    return named(step, values | {"semantic": features[:, :-1], "semantic_cls": features[:, -1]})


def _raw(case: Case, step: Step, model: MingTok) -> Tensor:
    latents = _source(case, step, "latent_raw")
    return model.scale.restore(latents) if step.args.get("destandardize", False) else latents


@runner("mingtok/tokenizer", "semantic")
@torch.no_grad()
def semantic(case: Case, step: Step) -> dict[str, Tensor]:
    check(step, "class_token", "last", None)
    check(step, "cache", False)
    model = _model(case, step)
    latents = _raw(case, step, model)
    features = model.semantic_decoder(latents)
    values = {"sem_in": model.semantic_decoder.embed(latents), "semantic": features}
    if step.args.get("class_token", "last") == "last":
        values |= {"semantic": features[:, :-1], "semantic_cls": features[:, -1]}
    return named(step, values)


@runner("mingtok/tokenizer", "semantic_stepwise")
@torch.no_grad()
def semantic_stepwise(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    latents = model.scale.standardise(_raw(case, step, model))
    expander = model.expander()
    parts = [expander.step(latents[:, i : i + 1]) for i in range(latents.shape[1])]
    return named(step, {"semantic": torch.cat(parts, 1)})


def _grid(model: MingTok, step: Step, count: int) -> tuple[int, int]:
    """That of the step's image, else a square."""
    given = step.tensor("image", 0)
    if given.ndim == 4:
        return model.check_pixels(given).grid
    return math.isqrt(count), math.isqrt(count)


@runner("mingtok/tokenizer", "pixel_tokens")
@torch.no_grad()
def pixel_tokens(case: Case, step: Step) -> dict[str, Tensor]:
    model, features = _model(case, step), _source(case, step, "semantic")
    return named(step, {"pix_tokens": model.pixel_decoder.spread(features, _grid(model, step, features.shape[1]))})


def _painted(case: Case, step: Step) -> dict[str, Tensor]:
    model, features = _model(case, step), _source(case, step, "semantic")
    grid = _grid(model, step, features.shape[1])
    patches = model.pixel_decoder.patches(model.pixel_decoder.spread(features, grid))
    pixels = model.pixel_decoder.join(patches, grid)
    return {"pix_patches": patches, "pixels_unclamped": pixels, "pixels": pixels}


@runner("mingtok/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    answers, clamp = named(step, _painted(case, step)), step.args.get("clamp") or {}
    return {name: value.clamp(*clamp[name]) if name in clamp else value for name, value in answers.items()}


@runner("mingtok/tokenizer", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _model(case, step), step.tensor("image", 0)
    pixels, grid = model(image).reconstruction, model.check_pixels(image).grid
    answers = {}
    for output in step.outputs:
        settings = step.args.get(output, {"loss": "l1_plain", "mask": None})
        if settings["loss"] != "l1_plain" or settings.get("covers", "unmasked") != "unmasked":
            raise GoldenFailure(f"{step.id}: {settings} is not computed, only l1_plain of unmasked places")
        weights = None
        if mask := settings.get("mask"):
            places = torch.arange(math.prod(grid))
            masked = (places >= mask["start"]) & ((places - mask["start"]) % mask["every"] == 0)
            weights = (~masked).float().view(1, 1, *grid).expand(len(image), -1, -1, -1)
            weights = weights.repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)
        answers[output] = L1()(pixels, image, weights)
    return answers


OPERATIONS = {
    ("mingtok/tokenizer", op): function
    for op, function in {
        "encode": encode,
        "semantic": semantic,
        "semantic_stepwise": semantic_stepwise,
        "encode_resized": encode_resized,
    }.items()
}
