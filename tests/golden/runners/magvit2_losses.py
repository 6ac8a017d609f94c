"""Runners of the losses and discriminators of Open-MAGVIT2 and IBQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.losses import L1, L2, BlurDiscriminator, DiscriminatorLoss, GeneratorLoss, LeCam, PatchGAN
from vistok.train.tasks.terms import TermConfig

from ..decoding import refuse
from ..expressions import named
from ..harness import Case, GoldenFailure, Step, runner

LOSSES, DISCRIMINATOR = "magvit2/losses", "magvit2/discriminator"
GAMES = {"non_saturate": "non_saturating_mean", "non_saturating": "non_saturating_mean", "hinge": "hinge"}
PIXELS = {"l1": L1, "l2": L2}


def _choice(step: Step, name: str, table: dict[str, Any], default: str) -> Any:
    value = step.args.get(name, default)
    if value not in table:
        raise GoldenFailure(f"{step.id}: {name} {value!r} is not computed, only {', '.join(table)}")
    return table[value]


@runner(LOSSES, "generator_loss")
def generator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    args, now = step.args, step.args["global_step"]
    if args.get("gen_loss_weight") is None:
        raise GoldenFailure(f"{step.id}: an adaptive weight needs a last layer, and this case has no model")
    pixel = _choice(step, "pixel", PIXELS, "l1")()(step.tensor("reconstruction", 1), step.tensor("image", 0))
    nll = pixel + args["perceptual_weight"] * step.tensor("lpips", 2).mean()
    adversarial = torch.zeros(())
    if now >= args.get("disc_start", 0):
        game = GeneratorLoss(_choice(step, "adversarial", GAMES, "non_saturating"))
        adversarial = args["gen_loss_weight"] * game(step.tensor("logits_fake_g", 3))
    entropy = step.tensor("entropy_loss", 4)
    if args.get("variant", "magvit2") == "ibq":
        quantized = args["quant_loss_weight"] * step.tensor("quant_loss", 5)
        codes = quantized + args["entropy_loss_weight"] * entropy
    else:
        refuse(step, variant="magvit2")
        ratio, until = args.get("codebook_enlarge_ratio", 3), args.get("codebook_enlarge_steps", 2000)
        term = TermConfig(args["codebook_weight"], boost=ratio, boost_steps=until)
        codes = term.weight * term.factor(now) * entropy + args["commit_weight"] * step.tensor("commitment", 5)
    return named(step, {"total": nll + adversarial + codes, "weighted adversarial term": adversarial, "nll": nll})


@runner(LOSSES, "discriminator_loss")
def discriminator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    game = DiscriminatorLoss(_choice(step, "loss", GAMES, "hinge"))
    order = {"before": "before_use", "after": "after_use"}
    lecam = LeCam(args.get("lecam_decay", 0.999), _choice(step, "lecam_ema_order", order, "before"), "logits").train()
    for average in (lecam.average_real, lecam.average_fake):
        average.fill_(args.get("lecam_init", 0.0))
    rows = args.get("rows", range(len(args["global_steps"])))
    found: dict[str, list[Tensor]] = {"d_loss": [], "lecam": []}
    for row, now in zip(rows, args["global_steps"], strict=True):
        real, fake = step.tensor("logits_real", 0)[row], step.tensor("logits_fake", 1)[row]
        is_on = now >= args.get("disc_start", 0)
        moves = is_on or args.get("lecam_update_before_start", True)
        regulariser = lecam(real, fake) if moves else torch.zeros(())
        loss = game(real, fake) + (args.get("lecam_weight") or 0.0) * regulariser
        found["lecam"].append(regulariser)
        found["d_loss"].append(loss if is_on else torch.zeros(()))
    averages = {"lecam_real_ema": lecam.average_real, "lecam_fake_ema": lecam.average_fake}
    return named(step, {name: torch.stack(values) for name, values in found.items()} | averages)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def _network(case: Case, step: Step) -> torch.nn.Module:
    part = step.args.get("part", "patch")
    if part not in case.config:
        raise GoldenFailure(f"{step.id}: part {part!r} is not in the config, which has {', '.join(case.config)}")
    config = case.config[part]
    if part == "blur":
        if not config.get("blur_resample", True):
            raise GoldenFailure(f"{step.id}: only blurring downsampling is computed")
        size = config.get("blur_kernel_size", 4)
        sizes = config["num_channels"], config["hidden_channels"], config["num_stages"], size
        network: torch.nn.Module = BlurDiscriminator(*sizes)
    else:
        if config.get("use_actnorm", False):
            raise GoldenFailure(f"{step.id}: actnorm is not computed")
        network = PatchGAN(config["input_nc"], config["ndf"], config["n_layers"])
    prefixes = [prefix for prefix, of in case.build["state_prefixes"].items() if of == part]
    network.load_state_dict({key: t for key, t in case.state.items() if key.partition(".")[0] in prefixes})
    return network.train(step.args.get("train", False))


@runner(DISCRIMINATOR, "discriminator")
def discriminator(case: Case, step: Step) -> dict[str, Tensor]:
    network, image = _network(case, step), step.tensor("image", 0).requires_grad_()
    logits = network(image)
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    values = {"logits": logits, "input_gradient": gradient}
    if isinstance(network, PatchGAN):
        norm = network.main[3]
        values |= {"running_mean_after": norm.running_mean, "running_var_after": norm.running_var}
    return named(step, values)
