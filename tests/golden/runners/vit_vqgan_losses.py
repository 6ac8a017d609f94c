"""Runners of ViT-VQGAN's losses and of its StyleGAN2 discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.losses import L1, L2, DiscriminatorLoss, GeneratorLoss, StyleGANDiscriminator, r1_penalty

from ..harness import Case, GoldenFailure, Step, runner


def _kind(name: str) -> str:
    return {"least_square": "least_squares"}.get(name, name)


def _settings(case: Case, step: Step) -> dict[str, Any]:
    """The step's arguments, over the config's. The networks must be replaced by numbers: these cases have no model."""
    for part in ("perceptual", "discriminator"):
        stand_in = case.build.get(part, "input")
        if not stand_in.startswith("input"):
            raise GoldenFailure(f"{step.id}: build.{part} is {stand_in!r}, expected inputs that stand for it")
    return {**case.config, **step.args}


def _adversary_is_on(settings: dict[str, Any]) -> bool:
    return settings["global_step"] >= settings["disc_start"]


@runner("vit_vqgan/losses", "generator_loss")
def generator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    settings = _settings(case, step)
    if settings.get("adaptive_weight", False):
        raise GoldenFailure(f"{step.id}: an adaptive weight needs a last layer, and this case has no model")
    image, reconstruction = step.tensor("image", 0), step.tensor("reconstruction", 1)
    l1, l2 = L1()(reconstruction, image), L2()(reconstruction, image)
    perceptual = step.tensor("lpips", 2).mean()
    adversarial = GeneratorLoss(_kind(settings["disc_loss"]))(step.tensor("logits_fake", 4))
    reconstruction_loss = (
        settings["loglaplace_weight"] * l1
        + settings["loggaussian_weight"] * l2
        + settings["perceptual_weight"] * perceptual
    )
    total = reconstruction_loss + settings["codebook_weight"] * step.tensor("quant_loss", 3)
    if _adversary_is_on(settings):
        total = total + settings["adversarial_weight"] * adversarial
    return step.answers(total, reconstruction_loss, l1, l2, perceptual, adversarial)


@runner("vit_vqgan/losses", "discriminator_loss")
def discriminator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    settings = _settings(case, step)
    loss = DiscriminatorLoss(_kind(settings["disc_loss"]))(step.tensor("logits_real", 0), step.tensor("logits_fake", 1))
    # Given logits are constant in the image, so R1 adds nothing even where it is on.
    return step.answers(loss if _adversary_is_on(settings) else torch.zeros(()))


@runner("vit_vqgan/losses", "gan_losses")
def gan_losses(case: Case, step: Step) -> dict[str, Tensor]:
    real, fake = step.tensor("logits_real", 0), step.tensor("logits_fake", 1)

    def loss(settings: dict[str, str]) -> Tensor:
        match settings["side"]:
            case "generator":
                return GeneratorLoss(_kind(settings["loss"]))(fake)
            case "discriminator":
                return DiscriminatorLoss(_kind(settings["loss"]))(real, fake)
            case side:
                raise GoldenFailure(f"{step.id}: unknown side {side!r}")

    return {name: loss(settings) for name, settings in step.args.items()}


def _discriminator(case: Case) -> StyleGANDiscriminator:
    def build() -> StyleGANDiscriminator:
        return StyleGANDiscriminator.from_official(case.config, case.state).requires_grad_(False)

    return case.once("discriminator", build)


@runner("vit_vqgan/discriminator", "features")
def features(case: Case, step: Step) -> dict[str, Tensor]:
    model = _discriminator(case)
    seen: dict[int, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output}))
        for index, block in enumerate(model.blocks)
    ]
    try:
        model(step.tensor("image", 0))
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[index] for name, index in step.args["blocks"].items()}


@runner("vit_vqgan/discriminator", "discriminator")
def discriminator(case: Case, step: Step) -> dict[str, Tensor]:
    model = _discriminator(case)
    image = step.tensor("image", 0).requires_grad_()
    logits = model(image)
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    return step.answers(logits, gradient, r1_penalty(model, image))
