"""Runners of LARP's tokenizer. Golden clips are in [0, 1], the native range."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import vistok
from vistok.tokenizers.larp import LARP
from vistok.types import QuantizerOutput

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner


def tokenizer(case: Case) -> LARP:
    """The tokenizer of the case, in eval mode."""
    eps = {"block_norm_eps": case.build["block_norm_eps"]} if "block_norm_eps" in case.build else {}
    build = lambda: vistok.from_official("larp/tokenizer", {**case.config, **eps}, case.state)  # noqa: E731
    return case.once("tokenizer", build).eval()


def pixels(case: Case, step: Step) -> Tensor:
    return tokenizer(case).from_native(step.tensor("video", 0))


def quantized(case: Case, step: Step) -> QuantizerOutput:
    """The deterministic pass."""
    refuse(step, deterministic=True)
    model = tokenizer(case)
    return model.quantizer(model.latents(pixels(case, step)))


def by_quantity(step: Step, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name, or by the quantity that ``returns`` maps them to; one that has neither is the next in order."""
    returns = step.args.get("returns", {})
    answers = {}
    for name, value in zip(step.outputs, values.values()):
        quantity = returns.get(name, name)
        if quantity not in values and name in returns:
            raise GoldenFailure(f"{step.id}: no quantity {quantity!r}; there are {', '.join(values)}")
        answers[name] = values.get(quantity, value)
    return answers


@runner("larp/tokenizer", "embed_patches")
@torch.no_grad()
def embed_patches(case: Case, step: Step) -> dict[str, Tensor]:
    model = tokenizer(case)
    return step.answers(model.encoder.embed_patches(model.to_native(pixels(case, step))))


@runner("larp/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(tokenizer(case).read(pixels(case, step)))


@runner("larp/tokenizer", "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    model, output = tokenizer(case), quantized(case, step)
    latents = model.latents(pixels(case, step))
    values = {
        "projected": model.pre_quant(model.read(pixels(case, step))),
        "z_normalized": F.normalize(latents, dim=-1) if model.quantizer.normalize else latents,
        "ids": output.ids,
        "quantized": output.quantized,
        "encoded": model.post_quant(output.quantized),
    }
    return by_quantity(step, values)


def _losses(step: Step, output: QuantizerOutput) -> dict[str, Tensor]:
    commit, codebook = output.losses["commitment"].mean(), output.losses["codebook"].mean()
    total = step.args["commit_loss_beta"] * commit + step.args["codebook_weight"] * codebook
    return {"loss_commit": commit, "loss_codebook": codebook, "loss_q": total}


@runner("larp/tokenizer", "quantizer_loss")
@torch.no_grad()
def quantizer_loss(case: Case, step: Step) -> dict[str, Tensor]:
    return by_quantity(step, _losses(step, quantized(case, step)))


@runner("larp/tokenizer", "reconstruct")
@torch.no_grad()
def reconstruct(case: Case, step: Step) -> dict[str, Tensor]:
    model, clips = tokenizer(case), pixels(case, step)
    if step.args.get("frames") is not None:
        clips = clips[:, :, : step.args["frames"]]
    match step.args["via"]:
        case "ids":
            ids = model.encode(clips)
            output = model.decode(ids, num_frames=clips.shape[2])
        case "encoded":
            whole = model(clips)
            ids, output = whole.tokens, whole.reconstruction
        case via:
            raise GoldenFailure(f"{step.id}: unknown via {via!r}")
    answers = by_quantity(step, {"recon": model.to_native(output), "ids": ids})
    for name, limits in (step.args.get("clamp") or {}).items():
        answers[name] = answers[name].clamp(*limits)
    return answers


@runner("larp/tokenizer", "stochastic_quantize")
@torch.no_grad()
def stochastic_quantize(case: Case, step: Step) -> dict[str, Tensor]:
    model = tokenizer(case)
    latents = model.latents(pixels(case, step))
    if "temperature" in step.args and model.quantizer.inverse_temperature != 1 / step.args["temperature"]:
        raise GoldenFailure(f"{step.id}: the step's temperature {step.args['temperature']} is not the config's")
    output = model.quantizer.assign(latents, step.tensor("sampled_ids", 1))
    values = {
        "assign_probs": model.quantizer.assignment_probabilities(latents),
        "quantized": output.quantized,
        **_losses(step, output),
    }
    order = {name: values[name] for name in ("assign_probs", "quantized", "loss_q", "loss_commit", "loss_codebook")}
    return by_quantity(step, order)
