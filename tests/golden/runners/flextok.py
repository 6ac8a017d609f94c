"""Runners of FlexTok: the whole tokenizer, its decoder alone, and its quantizer alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.flow import LinearPath, TimeSampling, last
from vistok.guidance import APG, Scale
from vistok.quantizers import FSQ
from vistok.tokenizers.flextok.model import FlexTok
from vistok.tokenizers.flextok.networks import FlowDecoder, denoise

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner

PATH = LinearPath(noise_at=1)

# ---------------------------------------------------------------------------------------------------------------------
# Quantizer


def _quantizer(case: Case) -> FSQ:
    return FSQ(case.config.get("regularizer", case.config)["levels"])


@runner("flextok/quantizer", "bound")
def bound(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_quantizer(case).bound(step.tensor("z", 0)))


@runner("flextok/quantizer", "quantize")
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    output = _quantizer(case)(step.tensor("z", 0)[None])
    return step.answers(output.quantized[0], output.ids[0])


@runner("flextok/quantizer", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, of="sum(quants * g)", wrt="z")
    z = step.tensor("z", 0).requires_grad_()
    quantized = _quantizer(case)(z[None]).quantized[0]
    return step.answers(*torch.autograd.grad((quantized * step.tensor("g", 1)).sum(), z))


@runner("flextok/quantizer", "lookup")
def lookup_ids(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer = _quantizer(case)
    codes = quantizer.ids_to_latents(step.tensor("ids", 0))
    return step.answers(codes, quantizer.latents_to_ids(codes))


# ---------------------------------------------------------------------------------------------------------------------
# Decoder


def _decoder(case: Case) -> FlowDecoder:
    return case.once("decoder", lambda: FlowDecoder.from_official(case.config, case.state).eval())


def _times(step: Step) -> Tensor:
    draws, rule = step.tensor("draws", len(step.inputs) - 1), dict(step.args["sigma"])
    match rule.pop("rule"):
        case "mode":
            return TimeSampling("mode", **rule)(draws)
        case "logit_normal":
            return TimeSampling("logit_normal", mean=rule.pop("mean", 0.0), std=rule.pop("std", 1.0)).from_normals(
                draws
            )
        case unknown:
            raise GoldenFailure(f"{step.id}: no rule {unknown!r} for sigma")


def _noised(step: Step) -> Tensor:
    return PATH.interpolate(step.tensor("x0", 0), step.tensor("noise", 1), _times(step))


def _condition(case: Case, step: Step) -> Tensor:
    codes = _quantizer(case).ids_to_latents(step.tensor("tokens", 3))
    lengths = torch.tensor(step.args.get("keep_k", [codes.shape[1]] * len(codes)))
    return _decoder(case).embed_codes(codes, lengths, torch.tensor(step.args.get("null", [False] * len(codes))))


@runner("flextok/decoder", "sigmas")
def sigmas(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_times(step))


@runner("flextok/decoder", "noised")
def noised(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_noised(step))


@runner("flextok/decoder", "time_embed")
@torch.no_grad()
def time_embed(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_decoder(case).time_embedding(_times(step)))


@runner("flextok/decoder", "packed_input")
@torch.no_grad()
def packed_input(case: Case, step: Step) -> dict[str, Tensor]:
    sequence = _decoder(case).embed(_noised(step), _condition(case, step))
    return step.answers(sequence.flatten(0, 1)[None])  # the reference packs the batch into one sequence


@runner("flextok/decoder", "repa_features")
@torch.no_grad()
def repa_features(case: Case, step: Step) -> dict[str, Tensor]:
    decoder, seen = _decoder(case), []
    handle = decoder.blocks[step.args["layer"]].register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        decoder(_noised(step), _times(step), _condition(case, step))
    finally:
        handle.remove()
    features = seen[0][:, : -step.tensor("tokens", 3).shape[1]]
    return step.answers(features, decoder.alignment_head(features))


@runner("flextok/decoder", "velocity")
@torch.no_grad()
def velocity(case: Case, step: Step) -> dict[str, Tensor]:
    predicted = _decoder(case)(_noised(step), _times(step), _condition(case, step)).velocity
    target = PATH.velocity(step.tensor("x0", 0), step.tensor("noise", 1))
    per_sample = (predicted - target).square().flatten(1).mean(1)
    return step.answers(predicted, per_sample, per_sample.mean())


def _sampling_options(step: Step) -> dict[str, Any]:
    refuse(step, solver="euler")
    apg = step.args.get("apg")
    return {
        "num_steps": step.args["num_steps"],
        "guidance_scale": _scale(step.args["guidance_scale"]),
        "guidance": APG(**apg) if apg else "cfg",
    }


def _scale(scale: float | dict[str, list[float]]) -> Scale:
    if not isinstance(scale, dict):
        return scale
    constant, slope = scale["affine"]
    return lambda t: constant + slope * t


@runner("flextok/decoder", "sample")
@torch.no_grad()
def sample(case: Case, step: Step) -> dict[str, Tensor]:
    codes = _quantizer(case).ids_to_latents(step.tensor("tokens", 0))
    lengths, noise = torch.tensor(step.args["keep_k"]), step.tensor("noise", 1)
    return step.answers(last(denoise(_decoder(case), codes, lengths, noise, **_sampling_options(step))).x)


# ---------------------------------------------------------------------------------------------------------------------
# The whole tokenizer. Golden pixels are in [-1, 1].


def _tokenizer(case: Case) -> FlexTok:
    widths = case.build.get("vae_block_out_channels")
    vae = case.config["vae"] | ({"block_out_channels": widths} if widths else {})
    return case.once("model", lambda: vistok.from_official(case.model, case.config | {"vae": vae}, case.state))


@runner("flextok/tokenizer", "vae_encode")
@torch.no_grad()
def vae_encode(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, posterior="mean")
    return step.answers(_tokenizer(case).to_maps(step.tensor("images", 0)))


@runner("flextok/tokenizer", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_tokenizer(case).encoder(step.tensor("latents", 0)))


@runner("flextok/tokenizer", "quantize")
@torch.no_grad()
def quantize_registers(case: Case, step: Step) -> dict[str, Tensor]:
    output = _tokenizer(case).quantizer(step.tensor("registers", 0))
    return step.answers(output.quantized, output.ids)


@runner("flextok/tokenizer", "lookup")
@torch.no_grad()
def lookup(case: Case, step: Step) -> dict[str, Tensor]:
    ids = step.tensor("tokens", 0)
    kept = torch.arange(ids.shape[1]) < torch.tensor(step.args["keep_k"])[:, None]
    return step.answers(_tokenizer(case).quantizer.ids_to_latents(torch.where(kept, ids, step.args["pad_id"])))


@runner("flextok/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    model, ids = _tokenizer(case), step.tensor("tokens", 0)
    lengths, noise = torch.tensor(step.args["keep_k"]), step.tensor("noise", 1)
    options = _sampling_options(step)
    latents = last(denoise(model.decoder, model.quantizer.ids_to_latents(ids), lengths, noise, **options)).x
    pixels = model.decode(ids, lengths=lengths, draws={"noise": noise}, **options)
    return step.answers(latents, pixels.clamp(-1, 1) if step.args["clamp"] else pixels)
