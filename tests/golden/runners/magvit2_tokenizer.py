"""Runners of Open-MAGVIT2's tokenizer and of its quantizer alone. Golden pixels are in [-1, 1], maps (B, d, h, w)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vistok.generators.open_magvit2_gpt.sub_tokens import SubTokens
from vistok.quantizers import LFQ
from vistok.tokenizers.open_magvit2 import OpenMAGVIT2, official

from ..expressions import gradients, named
from ..harness import Case, Step, runner

QUANTIZER, TOKENIZER = "magvit2/quantizer", "magvit2/tokenizer"


def _quantizer(case: Case, step: Step) -> LFQ:
    """With the step's settings of the entropy loss, else the config's."""
    settings = {**case.config, **step.args}
    return LFQ(
        case.config["embed_dim"],
        entropy_temperature=settings.get("temperature", 0.01),
        position_weight=settings.get("sample_minimization_weight", 1.0),
        usage_weight=settings.get("batch_maximization_weight", 1.0),
    ).train(settings.get("train", False))


def _rows(maps: Tensor) -> Tensor:
    return rearrange(maps, "b d h w -> b (h w) d")


def _maps(rows: Tensor, height: int) -> Tensor:
    return rearrange(rows, "b (h w) d -> b d h w", h=height)


def _raster(step: Step, name: str, position: int) -> Tensor:
    """Flat ids (B h w) as (B, h * w)."""
    height, width = step.args["grid"]
    return step.tensor(name, position).long().view(-1, height * width)


def _loss_terms(case: Case, step: Step, z: Tensor) -> dict[str, Tensor | float]:
    """What is computed from latents (B, d, h, w), and the step's numbers."""
    quantizer = _quantizer(case, step)
    output = quantizer(_rows(z))
    entropies = quantizer.entropy.entropies(_rows(z))
    return {
        "quant": _maps(output.quantized, z.shape[2]),
        "per_sample_entropy": entropies.position,
        "codebook_entropy": entropies.usage,
        "entropy_loss": output.losses["entropy"],
        "commitment": output.losses["commitment"].mean(),
        **{key: value for key, value in step.args.items() if isinstance(value, int | float)},
    }


def _split(case: Case, step: Step) -> SubTokens:
    return SubTokens(tuple(step.args.get("factorized_bits") or case.config["factorized_bits"]))


@runner(QUANTIZER, "quantize")
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    z = step.tensor("z", 0)
    output = _quantizer(case, step)(_rows(z))
    return named(step, {"quant": _maps(output.quantized, z.shape[2]), "ids": output.ids.flatten()})


@runner(QUANTIZER, "quantize_factorized")
def quantize_factorized(case: Case, step: Step) -> dict[str, Tensor]:
    ids = _quantizer(case, step).encode(_rows(step.tensor("z", 0))).flatten()
    return named(step, dict(zip(("ids_pre", "ids_post"), _split(case, step).split(ids))))


@runner(QUANTIZER, "codes")
def codes(case: Case, step: Step) -> dict[str, Tensor]:
    rows = _quantizer(case, step).ids_to_latents(_raster(step, "ids", 0))
    return named(step, {"codes": _maps(rows, step.args["grid"][0])})


@runner(QUANTIZER, "codes_factorized")
def codes_factorized(case: Case, step: Step) -> dict[str, Tensor]:
    parts = [_raster(step, "ids_pre", 0), _raster(step, "ids_post", 1)]
    rows = _quantizer(case, step).ids_to_latents(_split(case, step).join(parts))
    return named(step, {"codes": _maps(rows, step.args["grid"][0])})


@runner(QUANTIZER, "entropy_loss")
def entropy_loss(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, _loss_terms(case, step, step.tensor("z", 0)))


@runner(QUANTIZER, "total")
def total(case: Case, step: Step) -> dict[str, Tensor]:
    terms, args = _loss_terms(case, step, step.tensor("z", 0)), step.args
    value = args["entropy_weight"] * terms["entropy_loss"] + args["commit_weight"] * terms["commitment"]
    return named(step, {"total": value})


@runner(QUANTIZER, "gradients")
def quantizer_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    z = step.tensor("z", 0).requires_grad_()
    terms = _loss_terms(case, step, z)
    if len(step.inputs) > 1:
        terms["weight"] = step.tensor("weight", 1)
    return gradients(step, terms, step.args["of"], {"(z)": z})


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def _tokenizer(case: Case, step: Step) -> OpenMAGVIT2:
    return case.build_model().train(step.args.get("train", False))


@runner(TOKENIZER, "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, {"z": _tokenizer(case, step).encoder(step.tensor("image", 0))})


@runner(TOKENIZER, "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _tokenizer(case, step), step.tensor("image", 0)
    quant = _maps(model(image).features["quantized"], image.shape[2] // model.stride)
    return named(step, {"ids": model.encode(image).flatten(), "quant": quant})


@runner(TOKENIZER, "encode_factorized")
@torch.no_grad()
def encode_factorized(case: Case, step: Step) -> dict[str, Tensor]:
    ids = _tokenizer(case, step).encode(step.tensor("image", 0)).flatten()
    return named(step, dict(zip(("ids_pre", "ids_post"), _split(case, step).split(ids))))


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
    image, args = step.tensor("image", 0), step.args
    output = _tokenizer(case, step)(image)
    terms = _loss_terms(case, step, _maps(output.features["latents"], image.shape[2] // case.build_model().stride))
    terms["mse"] = (output.reconstruction - image).square().mean()
    weighted = args.get("entropy_weight", 0.0) * terms["entropy_loss"] + args["commit_weight"] * terms["commitment"]
    return terms | {"loss": terms["mse"] + weighted}


@runner(TOKENIZER, "train_losses")
@torch.no_grad()
def train_losses(case: Case, step: Step) -> dict[str, Tensor]:
    return named(step, _training(case, step))


@runner(TOKENIZER, "gradients")
def tokenizer_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    model, wanted = _tokenizer(case, step), step.args["wrt"].values()
    parameters, levels = dict(model.named_parameters()), len(model.decoder.levels)
    names = {key: next(iter(official.our_names({key: torch.empty(0)}, levels))) for key in wanted}
    return gradients(
        step, _training(case, step), step.args["of"], {key: parameters[name] for key, name in names.items()}
    )
