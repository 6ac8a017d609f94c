"""Runners of D-AR's tokenizer and of its transformer."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from vistok.flow import shift_time
from vistok.losses import alignment_distance
from vistok.tokenizers.dar.model import DAR
from vistok.types import TokenizerOutput

from ..decoding import refuse
from ..harness import Case, Step, runner
from . import llamagen

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer. Golden pixels are in [-1, 1].

SOLVERS = {"adams2": "adams_bashforth2", "euler": "euler"}


@runner("dar/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model: DAR = case.build_model().train(step.args["train"])
    prequant = model.latents(step.tensor("image", 0))
    quantized = model.quantizer(prequant)
    return step.answers(prequant, quantized.ids, quantized.quantized, model.embed_codes(quantized.quantized))


@runner("dar/tokenizer", "velocity")
@torch.no_grad()
def velocity(case: Case, step: Step) -> dict[str, Tensor]:
    model: DAR = case.build_model()
    t, tokens = step.tensor("time_u", 1), step.tensor("cond", 2)[:, slice(*step.args["cond_slice"])]
    t = shift_time(t, model.time_shift) if step.args["time_shift"] else t
    return step.answers(model.velocity(step.tensor("noise", 0), t, tokens).velocity)


@runner("dar/tokenizer", "decode")
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    model: DAR = case.build_model()
    ids, args = step.tensor("ids", 0), step.args
    options = {"num_steps": args["num_steps"], "solver": SOLVERS[args["solver"]]}
    options["draws"] = {"noise": step.tensor("noise", 1)}
    previews = list(islice(model.decode_stream(ids, **options), args["clip_steps"] or args["num_steps"]))
    if "tokens_needed" in args:
        prefix = model.decode(ids[:, : args["tokens_needed"]], **options)
        torch.testing.assert_close(prefix, previews[-1], atol=step.tol, rtol=0)
    return step.answers(previews[-1].clamp(-1, 1) if args["clamp"] else previews[-1])


def _forward(case: Case, step: Step) -> TokenizerOutput:
    model: DAR = case.build_model().train(step.args["train"])
    draws = {"noise": step.tensor("noise", 1), "time": step.tensor("time_u", 2)}
    return model(step.tensor("image", 0), draws=draws)


@runner("dar/tokenizer", "train_forward")
@torch.no_grad()
def train_forward(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, entropy_loss_ratio=0.0)
    output = _forward(case, step)
    return step.answers(
        output.losses["codebook"],
        step.args["commit_loss_beta"] * output.losses["commitment"],
        output.losses["flow"].mean(),
        output.reconstruction,
        output.features["time"],
        output.features.get("alignment"),
    )


@runner("dar/tokenizer", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, perceptual="image_mse", repa_features="repa_a @ repa_b", gan=False)
    args, output = step.args, _forward(case, step)
    perceptual = (output.reconstruction - step.tensor("image", 0)).square().flatten(1).mean(1)
    if args["perceptual_weight"] < 0:  # the reference's sign for a weight that grows with time
        perceptual = perceptual * 2 * output.features["time"]
    target = step.tensor("repa_a", 3) @ step.tensor("repa_b", 4)
    alignment = alignment_distance(output.features["alignment"], target).mean()
    codes = output.losses["codebook"] + args.get("commit_loss_beta", 0.25) * output.losses["commitment"]
    total = (
        args["codebook_weight"] * codes
        + args["flow_weight"] * output.losses["flow"].mean()
        + abs(args["perceptual_weight"]) * perceptual.mean()
        + args["repa_weight"] * alignment
    )
    return step.answers(total, alignment, perceptual.mean())


# ---------------------------------------------------------------------------------------------------------------------
# Transformer: LlamaGen's, but for the positions

runner("dar/gpt", "logits")(llamagen.logits)
runner("dar/gpt", "loss")(llamagen.loss)
runner("dar/gpt", "generate")(llamagen.generate_ids)
runner("dar/gpt", "filter_probs")(llamagen.filter_probs)
