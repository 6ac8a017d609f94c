"""Runners of LARP's video discriminator and of the losses on its logits. Clips are in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.losses import L1, DiscriminatorLoss, GeneratorLoss, LeCam, Smoothing, ViTDiscriminator, r1_penalty
from vistok.tokenizers.larp.official import build_discriminator

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner
from .larp_tokenizer import by_quantity


def _discriminator(case: Case) -> ViTDiscriminator:
    eps = {"block_norm_eps": case.build["block_norm_eps"]} if "block_norm_eps" in case.build else {}
    model = case.once("discriminator", lambda: build_discriminator({**case.config, **eps}, case.state))
    return model.train(case.build.get("train", False))


def _logits(case: Case, step: Step) -> tuple[Tensor, Tensor]:
    model = _discriminator(case)
    return model(step.tensor("real", 0)), model(step.tensor("fake", 1))


@runner("larp/discriminator", "discriminator")
@torch.no_grad()
def discriminator(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(*(logits[:, None] for logits in _logits(case, step)))


@runner("larp/discriminator", "gan_loss")
@torch.no_grad()
def gan_loss(case: Case, step: Step) -> dict[str, Tensor]:
    real, fake = _logits(case, step)

    def loss(settings: dict[str, str]) -> Tensor:
        kind = {"ns": "non_saturating"}.get(settings["loss"], settings["loss"])
        match settings["side"]:
            case "generator":
                return GeneratorLoss(kind)(fake)
            case "discriminator":
                return DiscriminatorLoss(kind)(real, fake)
            case side:
                raise GoldenFailure(f"{step.id}: unknown side {side!r}")

    return {name: loss(settings) for name, settings in step.args.items()}


def _smoothed(step: Step, logits: tuple[Tensor, Tensor]) -> Tensor:
    smoothing = Smoothing(step.args["slope"], step.args["real_floor"], step.args["fake_ceiling"])
    noise = tuple(
        step.tensor(name, position).view(one.shape)
        for name, position, one in zip(("noise_real", "noise_fake"), (2, 3), logits)
    )
    return DiscriminatorLoss("non_saturating", smoothing)(*logits, noise=noise)


@runner("larp/discriminator", "smooth_discriminator_loss")
@torch.no_grad()
def smooth_discriminator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_smoothed(step, _logits(case, step)))


@runner("larp/discriminator", "discriminator_total")
def discriminator_total(case: Case, step: Step) -> dict[str, Tensor]:
    logits, weight = _logits(case, step), step.args["lecam_weight"] ** 2
    if abs(step.args.get("lecam_weight_effective", weight) - weight) > 1e-12:
        raise GoldenFailure(f"{step.id}: lecam_weight_effective is not the square of lecam_weight")
    lecam = LeCam(step.args["lecam_decay"], compare="batch_means").train()
    lecam.average_real.copy_(case.state["lecam_ema_real"])
    lecam.average_fake.copy_(case.state["lecam_ema_fake"])
    total, regulariser = _smoothed(step, logits), lecam(*logits)
    total = total + weight * regulariser
    if step.args.get("r1_weight"):
        total = total + step.args["r1_weight"] * r1_penalty(_discriminator(case), step.tensor("real", 0))
    averages = {"real": lecam.average_real, "fake": lecam.average_fake}
    after = torch.stack([averages[name] for name in step.args.get("lecam_ema_order", ("real", "fake"))])
    return by_quantity(step, {"lecam_reg": regulariser, "d_total": total, "lecam_ema_after": after})


@runner("larp/discriminator", "generator_total")
@torch.no_grad()
def generator_total(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, perceptual_weight=0.0)
    real, fake = step.tensor("real", 0), step.tensor("fake", 1)
    l1 = L1()(fake, real)
    adversarial = GeneratorLoss(step.args["loss"])(_discriminator(case)(fake))
    total = step.args["l1_weight"] * l1 + step.args["disc_weight"] * adversarial
    return by_quantity(step, {"l1": l1, "g_total": total})


@runner("larp/discriminator", "r1_penalty")
def r1(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(step.args["cost"] * r1_penalty(_discriminator(case), step.tensor("real", 0)))
