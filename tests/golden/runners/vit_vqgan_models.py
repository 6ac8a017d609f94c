"""Runners of ViT-VQGAN's tokenizer and of its stage-2 transformer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.checkpoints import rename
from vistok.tokenizers.vit_vqgan import OFFICIAL_NAMES, RESIDUAL_CODEBOOK, ViTVQGAN
from vistok.types import Condition, TokenizerOutput

from ..decoding import generate, refuse
from ..harness import Case, GoldenFailure, Step, quirk_check, runner

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer. Golden pixels are in [0, 1], the native range.


def _pixels(case: Case, step: Step) -> Tensor:
    return case.build_model().from_native(step.tensor("image", 0))


def _native(case: Case, step: Step, pixels: Tensor) -> Tensor:
    native = case.build_model().to_native(pixels)
    return native.clamp(0, 1) if step.args.get("clamp", False) else native


def _quantizer_loss(case: Case, output: TokenizerOutput) -> Tensor:
    beta = case.config["quantizer"].get("beta", 0.25)
    return output.losses["codebook"].mean() + beta * output.losses["commitment"].mean()


@runner("vit_vqgan/tokenizer", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    model: ViTVQGAN = case.build_model()
    seen: list[Tensor] = []
    handle = model.encoder.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        model.latents(_pixels(case, step))
    finally:
        handle.remove()
    return step.answers(seen[0])


@runner("vit_vqgan/tokenizer", "pre_quant")
@torch.no_grad()
def pre_quant(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(case.build_model().latents(_pixels(case, step)))


@runner("vit_vqgan/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(case.build_model().encode(_pixels(case, step)))


@runner("vit_vqgan/tokenizer", "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    output = case.build_model()(_pixels(case, step))
    return step.answers(output.features["quantized"], _quantizer_loss(case, output))


@runner("vit_vqgan/tokenizer", "reconstruct")
@torch.no_grad()
def reconstruct(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_native(case, step, case.build_model()(_pixels(case, step)).reconstruction))


@runner("vit_vqgan/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_native(case, step, case.build_model().decode(step.tensor("ids", 0))))


@runner("vit_vqgan/tokenizer", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, rec_loss="mse")
    model: ViTVQGAN = case.build_model()
    output = model(_pixels(case, step))
    reconstruction_loss = F.mse_loss(model.to_native(output.reconstruction), step.tensor("image", 0))
    loss = step.args["rec_weight"] * reconstruction_loss + step.args["quant_weight"] * _quantizer_loss(case, output)
    parameters = dict(model.named_parameters())
    rules = OFFICIAL_NAMES if model.depth == 1 else [RESIDUAL_CODEBOOK, *OFFICIAL_NAMES]
    wanted = {}
    for name, official_key in step.args["wrt"].items():
        (key,) = rename({official_key: None}, rules)
        if key not in parameters:
            raise GoldenFailure(f"{step.id}: no parameter {key!r} stands for {official_key!r}")
        wanted[name] = parameters[key]
    answers = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()))))
    (loss_name,) = (name for name in step.outputs if name not in wanted)
    return {loss_name: loss, **answers}


# ---------------------------------------------------------------------------------------------------------------------
# Stage-2 transformer


@runner("vit_vqgan/gpt", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, loss="mean_cross_entropy")
    output = case.build_model()(step.tensor("codes", 0), Condition.from_ids(step.tensor("conds", 1)))
    return step.answers(output.prediction, output.loss)


@runner("vit_vqgan/gpt", "generate")
def greedy(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(generate(case.build_model(), Condition.from_ids(step.tensor("conds", 0)), step))


@quirk_check("vit_vqgan/gpt", "generate_reference_cache")
def cached_ids_differ(case: Case, step: Step) -> None:
    """The reference's cache loses the token shift's memory after the first token; ours keeps it."""
    ours = generate(case.build_model(), Condition.from_ids(step.tensor("conds", 0)), step)
    theirs = step.expected(step.outputs[0])
    assert torch.equal(ours[:, 0], theirs[:, 0]), f"{step.id}: the first token does not depend on the cache"
    assert not torch.equal(ours, theirs), f"{step.id}: the reference's faulty sampler is reproduced"


@quirk_check("vit_vqgan/gpt", "logits_reference_cache")
@torch.no_grad()
def cached_logits_differ(case: Case, step: Step) -> None:
    """Cached logits of ours equal the teacher-forced ones; the reference's do so at the first position only."""
    model, codes = case.build_model(), step.tensor("codes", 0)
    condition = Condition.from_ids(step.tensor("conds", 1))
    theirs = step.expected(step.outputs[0])
    error = (model.logits(codes, condition) - theirs).abs().amax((0, 2))  # per position
    assert error[0] <= step.tol, f"{step.id}: logits differ at position 0 by {error[0]:.3g}"
    assert (error[1:] > step.tol).all(), f"{step.id}: the reference's faulty logits are reproduced: {error.tolist()}"
