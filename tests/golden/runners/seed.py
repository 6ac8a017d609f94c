"""Runners of SEED. Features are those of the vision transformer before ``ln_vision``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.tokenizers.seed import SEED
from vistok.tokenizers.seed.official import our_names

from ..harness import Case, GoldenFailure, Step, runner

MODEL = "seed/tokenizer"


def _model(case: Case, step: Step) -> SEED:
    model = case.once("model", lambda: vistok.from_official(case.model, case.config, case.state))
    return model.train(step.args.get("train", case.build.get("train", False)))


def _named(step: Step, values: Mapping[str, Any]) -> dict[str, Any]:
    """The step's outputs from quantities by name; of a single quantity, whatever the output is called."""
    returns, answers = step.args.get("returns", {}), {}
    for output in step.outputs:
        name = returns.get(output, output)
        if name not in values and len(values) > 1:
            raise GoldenFailure(f"{step.id}: there is no quantity {name!r}; there are {', '.join(values)}")
        answers[output] = values[name] if name in values else next(iter(values.values()))
    return answers


def _ids(case: Case, step: Step) -> Tensor:
    return _model(case, step).encode_features(step.tensor("features", 0))


@runner(MODEL, "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    queries = model.query_features(step.tensor("features", 0))
    return _named(step, {"query_output": queries, "z": model.to_latents(queries)})


@runner(MODEL, "tokenize")
@torch.no_grad()
def tokenize(case: Case, step: Step) -> dict[str, Tensor]:
    return _named(step, {"ids": _ids(case, step)})


@runner(MODEL, "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("from", "quantized") not in ("quantized", "ids"):
        raise GoldenFailure(f"{step.id}: decoding from {step.args['from']!r} is not computed, only from quantized")
    model = _model(case, step)
    return _named(step, {"decoded": model.from_latents(model.quantizer.ids_to_latents(_ids(case, step)))})


@runner(MODEL, "embed_from_ids")
@torch.no_grad()
def embed_from_ids(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("from", "ids") != "ids":
        raise GoldenFailure(f"{step.id}: embedding from {step.args['from']!r} is not computed, only from ids")
    return _named(step, {"image_embeds": _model(case, step).decode_features(_ids(case, step))})


@runner(MODEL, "loss")
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    args, build = step.args, case.build
    model, frozen = _model(case, step), args.get("qformer_frozen", True)
    model.freeze_qformer = frozen
    model.qformer.requires_grad_(not frozen)
    model.vision_norm.requires_grad_(not frozen)
    try:
        losses = model.forward_features(step.tensor("features", 0), step.tensor("target", 1)).losses
    finally:
        model.freeze_qformer = True
    codebook, commitment = losses["codebook"].mean(), losses["commitment"].mean()
    beta, side = build.get("commitment_beta", 0.25), build.get("beta_applies_to", "codebook_term")
    terms = {
        "vq": commitment + beta * codebook if side == "codebook_term" else codebook + beta * commitment,
        "reconstruction": losses["query"].mean(),
        "image": losses["image"].mean(),
    }
    weights = {"vq": 5.0, "reconstruction": 2.0, "image": 0.5} | args.get("weights", {})
    if unknown := weights.keys() - terms.keys():
        raise GoldenFailure(f"{step.id}: no terms {', '.join(sorted(unknown))}; there are {', '.join(terms)}")
    total = sum(weights[name] * term for name, term in terms.items())
    values = {"vq_loss": terms["vq"], "recon_loss": terms["reconstruction"], "image_loss": terms["image"]}
    values["loss"] = total
    of = args.get("of", "loss")
    return _named(step, values | _gradients(step, values[of], model))


def _gradients(step: Step, of: Tensor, model: SEED) -> dict[str, Tensor]:
    parameters, answers = dict(model.named_parameters()), {}
    for output, keys in step.args.get("wrt", {}).items():
        several = isinstance(keys, list)
        named = [next(iter(our_names({key: torch.empty(0)}))) for key in (keys if several else [keys])]
        grads = torch.autograd.grad(of, [parameters[name] for name in named], retain_graph=True)
        if step.args.get("reduce", {}).get(output) == "l2_norm":
            grads = [grad.norm() for grad in grads]
        answers[output] = torch.stack(list(grads)) if several else grads[0]
    return answers
