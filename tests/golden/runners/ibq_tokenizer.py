"""Runners of IBQ's tokenizer and of its quantizer alone. Golden pixels are in [-1, 1], maps (B, d, h, w)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vistok.quantizers import IndexQuantizer
from vistok.tokenizers.ibq import IBQ
from vistok.tokenizers.ibq.model import our_names

from ..expressions import gradients, named
from ..harness import Case, Step, runner

QUANTIZER, TOKENIZER = "ibq/quantizer", "ibq/tokenizer"
CODEBOOK = "quantize.embedding.weight"


def _rows(maps: Tensor) -> Tensor:
    return rearrange(maps, "b d h w -> b (h w) d")


def _maps(rows: Tensor, height: int) -> Tensor:
    return rearrange(rows, "b (h w) d -> b d h w", h=height)


def _raster(step: Step, name: str, position: int) -> Tensor:
    """Flat ids (B h w) as (B, h * w)."""
    height, width = step.args["grid"]
    return step.tensor(name, position).long().view(-1, height * width)


def _quantizer(case: Case, step: Step) -> IndexQuantizer:
    """With the step's settings of the entropy loss, else the config's."""
    settings = {**case.config, **step.args}
    codebook = case.state[CODEBOOK]
    quantizer = IndexQuantizer(
        *codebook.shape,
        entropy_temperature=settings.get("temperature", settings.get("entropy_temperature", 0.01)),
        position_weight=settings.get("sample_minimization_weight", 1.0),
        usage_weight=settings.get("batch_maximization_weight", 1.0),
    )
    quantizer.embedding.weight.data.copy_(codebook)
    return quantizer.train(settings.get("train", True))


def _loss_terms(case: Case, step: Step, quantizer: IndexQuantizer, z: Tensor) -> dict[str, Tensor | float]:
    """What is computed from latents (B, d, h, w), and the step's numbers."""
    output = quantizer(_rows(z))
    entropies = quantizer.entropy.entropies(-quantizer.scores(_rows(z)))
    losses = {name: term.mean() for name, term in output.losses.items()}
    beta = step.args.get("beta", case.config.get("beta", 0.25))
    return {
        "quant": _maps(output.quantized, z.shape[2]),
        "quant_loss": losses["quantization"] + losses["commitment"] + beta * losses["codebook"],
        "sample_entropy": entropies.position,
        "avg_entropy": entropies.usage,
        "entropy_loss": losses["entropy"],
        **{key: value for key, value in step.args.items() if isinstance(value, int | float)},
    }


@runner(QUANTIZER, "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    z = step.tensor("z", 0)
    output = _quantizer(case, step)(_rows(z))
    return named(step, {"quant": _maps(output.quantized, z.shape[2]), "ids": output.ids.flatten()})


@runner(QUANTIZER, "codes")
@torch.no_grad()
def codes(case: Case, step: Step) -> dict[str, Tensor]:
    rows = _quantizer(case, step).ids_to_latents(_raster(step, "ids", 0))
    return named(step, {"codes": _maps(rows, step.args["grid"][0])})


@runner(QUANTIZER, "quantizer_loss")
@torch.no_grad()
def quantizer_loss(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, _loss_terms(case, step, _quantizer(case, step), step.tensor("z", 0)))


@runner(QUANTIZER, "total")
@torch.no_grad()
def total(case: Case, step: Step) -> dict[str, Tensor]:
    terms, args = _loss_terms(case, step, _quantizer(case, step), step.tensor("z", 0)), step.args
    value = args["quant_loss_weight"] * terms["quant_loss"] + args["entropy_loss_weight"] * terms["entropy_loss"]
    return named(step, {"total": value})


@runner(QUANTIZER, "gradients")
def quantizer_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    z, quantizer = step.tensor("z", 0).requires_grad_(), _quantizer(case, step)
    terms = _loss_terms(case, step, quantizer, z)
    if len(step.inputs) > 1:
        terms["weight"] = step.tensor("weight", 1)
    return gradients(step, terms, step.args["of"], {"(z)": z, CODEBOOK: quantizer.embedding.weight})


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def _tokenizer(case: Case, step: Step) -> IBQ:
    return case.build_model().train(step.args.get("train", False))


@runner(TOKENIZER, "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    model = _tokenizer(case, step)
    features = model.encoder(step.tensor("image", 0))
    return step.answers(features, model.pre_quant(features))


@runner(TOKENIZER, "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _tokenizer(case, step), step.tensor("image", 0)
    quant = _maps(model(image).features["quantized"], image.shape[2] // model.stride)
    return named(step, {"ids": model.encode(image).flatten(), "quant": quant})


@runner(TOKENIZER, "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    pixels = _tokenizer(case, step).decode(_raster(step, "ids", 0), grid=tuple(step.args["grid"]))
    return named(step, {"decoded": pixels.clamp(-1, 1) if step.args["clamp"] else pixels})


@runner(TOKENIZER, "reconstruct")
@torch.no_grad()
def reconstruct(case: Case, step: Step) -> dict[str, Tensor]:
    pixels = _tokenizer(case, step)(step.tensor("image", 0)).reconstruction
    return named(step, {"reconstruction": pixels.clamp(-1, 1) if step.args["clamp"] else pixels})


def _training(case: Case, step: Step) -> dict[str, Tensor | float]:
    image, model = step.tensor("image", 0), _tokenizer(case, step)
    output = model(image)
    losses = {name: term.mean() for name, term in output.losses.items()}
    beta = step.args.get("beta", case.config.get("beta", 0.25))
    terms = {
        "mse": (output.reconstruction - image).square().mean(),
        "quant_loss": losses["quantization"] + losses["commitment"] + beta * losses["codebook"],
    }
    if "entropy" in losses:
        z = _maps(output.features["latents"], image.shape[2] // model.stride)
        terms["entropy_loss"] = _loss_terms(case, step, _quantizer(case, step), z)["entropy_loss"]
    return terms | {key: value for key, value in step.args.items() if isinstance(value, int | float)}


@runner(TOKENIZER, "train_losses")
@torch.no_grad()
def train_losses(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, _training(case, step))


@runner(TOKENIZER, "gradients")
def tokenizer_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    model, wanted = _tokenizer(case, step), step.args["wrt"].values()
    parameters, levels = dict(model.named_parameters()), len(model.decoder.levels)
    names = {key: next(iter(our_names({key: torch.empty(0)}, levels))) for key in wanted}
    return gradients(
        step, _training(case, step), step.args["of"], {key: parameters[name] for key, name in names.items()}
    )
