"""Runners of RobusTok. Golden pixels are in [-1, 1], latents (B, C, h, w), ids flat (B L)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import vistok
from vistok.losses import (
    L1,
    L2,
    DiffAugment,
    DiscriminatorLoss,
    LeCam,
    SemanticGuide,
    adaptive_weight,
    contrastive_loss,
)
from vistok.losses.augment import GROUPS
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.perturbation import EXCHANGE, RANK, Annealing, Perturbation, perturb
from vistok.tokenizers.robustok import RobusTok
from vistok.tokenizers.robustok.official import our_names
from vistok.types import QuantizerOutput

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case, step: Step) -> RobusTok:
    forced = {key: case.build[key] for key in ("drop_path",) if key in case.build}
    model = case.once("model", lambda: vistok.from_official(case.model, {**case.config, **forced}, case.state))
    return model.train(step.args.get("train", case.build.get("train", False)))


def _as_map(latents: Tensor) -> Tensor:
    side = round(latents.shape[1] ** 0.5)
    return rearrange(latents, "b (h w) c -> b c h w", h=side)


def _from_map(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c h w -> b (h w) c")


def _named(step: Step, values: Mapping[str, Any], default: str | None = None) -> dict[str, Any]:
    """The step's outputs from quantities by name: an output's own, or that which ``returns`` maps it to."""
    returns = step.args.get("returns", {})
    answers = {}
    for output in step.outputs:
        name = returns.get(output, output)
        if name not in values and default is not None:
            name = default
        if name not in values:
            raise GoldenFailure(f"{step.id}: there is no quantity {name!r}; there are {', '.join(values)}")
        answers[output] = values[name]
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@runner("robustok/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _model(case, step), step.tensor("image", 0)
    features = model.encoder(image)
    return _named(step, {"features": features, "z": _as_map(model.pre_quant(features))})


@runner("robustok/tokenizer", "tokenize")
@torch.no_grad()
def tokenize(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_model(case, step).encode(step.tensor("image", 0)).flatten())


def _quantized(model: RobusTok, image: Tensor) -> Tensor:
    return model.quantizer.ids_to_latents(model.encode(image))


@runner("robustok/tokenizer", "quantize")
@torch.no_grad()
def quantize_image(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_as_map(_quantized(_model(case, step), step.tensor("image", 0))))


@runner("robustok/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("from", "z_q") != "z_q":
        raise GoldenFailure(f"{step.id}: decoding from {step.args['from']!r} is not computed, only from z_q")
    model = _model(case, step)
    pixels = model.decode_latents(_quantized(model, step.tensor("image", 0)))
    clamp = step.args.get("clamp") or {}
    return {name: pixels.clamp(*clamp[name]) if name in clamp else pixels for name in step.outputs}


@runner("robustok/tokenizer", "decode_ids")
@torch.no_grad()
def decode_ids(case: Case, step: Step) -> dict[str, Tensor]:
    pixels = _model(case, step).decode(step.tensor("tokens", 0))
    clamp = step.args.get("clamp") or {}
    return {name: pixels.clamp(*clamp[name]) if name in clamp else pixels for name in step.outputs}


def _guide(case: Case, mean: Any = None, std: Any = None) -> SemanticGuide:
    from timm.models.vision_transformer import VisionTransformer

    def build() -> SemanticGuide:
        prefix, size = "semantic_model.", case.config.get("overrides", {})
        encoder = VisionTransformer(
            img_size=size.get("img_size", 256),
            patch_size=size.get("patch_size", 16),
            embed_dim=size.get("embed_dim", 768),
            depth=size.get("depth", 12),
            num_heads=size.get("heads", 12),
            init_values=1e-5,
            num_classes=0,
        )
        state = {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}
        encoder.load_state_dict(state)
        return SemanticGuide(encoder, mean and tuple(mean), std and tuple(std))

    return case.once(f"guide {mean} {std}", build)


@runner("robustok/tokenizer", "semantic_feature")
@torch.no_grad()
def semantic_feature(case: Case, step: Step) -> dict[str, Tensor]:
    low, high = step.args.get("input_range", [-1.0, 1.0])
    image = (step.tensor("image", 0) - low) / (high - low) * 2 - 1
    return step.answers(_guide(case, step.args.get("mean"), step.args.get("std"))(image))


def _draws(case: Case, batch: int, strength: int) -> dict[str, Tensor]:
    """The uniform numbers that give the case's exchanges and ranks."""
    rank = (case.tensor("random_rank").double() + 0.5) / strength
    return {EXCHANGE: case.tensor("random_prob").view(batch, -1), RANK: rank.float().view(batch, -1)}


def _perturbed(case: Case, step: Step) -> tuple[RobusTok, QuantizerOutput, Tensor]:
    """The model, what its quantizer gives with the step's perturbation, and the decoded image."""
    model, image, args = _model(case, step), step.tensor("image", 0), step.args
    perturbation = Perturbation(args["alpha"], args["beta"], args["delta"])
    model.quantizer.perturbation = perturbation if model.training else None
    try:
        output = model.quantizer(model.latents(image), draws=_draws(case, len(image), args["delta"]))
    finally:
        model.quantizer.perturbation = None
    return model, output, model.decode_latents(output.quantized)


@runner("robustok/tokenizer", "train_forward")
@torch.no_grad()
def train_forward(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_perturbed(case, step)[2])


@runner("robustok/tokenizer", "train_losses")
def train_losses(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    model, output, decoded = _perturbed(case, step)
    image = step.tensor("image", 0)
    semantic = contrastive_loss(
        output.quantized.mean(1),
        model.project_semantic(_guide(case)(image)),
        scale=args.get("semantic_scale", 1.0),
        normalise=args.get("semantic_clip_norm", False),
    )
    terms = {
        "vq_loss": output.losses["codebook"].mean(),
        "commit_loss": args["commit_loss_beta"] * output.losses["commitment"].mean(),
        "sem_loss": args["semantic_weight"] * semantic,
    }
    weights = args.get("weights")
    if weights is None:
        return _named(step, terms)
    unbuilt = [name for name in ("perceptual", "adversarial") if weights.get(name, 0)]
    if unbuilt:
        raise GoldenFailure(f"{step.id}: weights of {unbuilt} need networks that this case does not have")
    target = case.tensor("target") if step.has("target") else image
    distance = {"l1": L1(), "l2": L2()}[args.get("reconstruction", "l2")]
    terms["rec_loss"] = distance(decoded, target)
    names = {"reconstruction": "rec_loss", "codebook": "vq_loss", "commit": "commit_loss", "semantic": "sem_loss"}
    terms["loss"] = sum(weights.get(name, 0.0) * terms[term] for name, term in names.items())
    return _named(step, terms | _gradients(step, terms["loss"], model))


def _gradients(step: Step, loss: Tensor, model: RobusTok) -> dict[str, Tensor]:
    parameters, answers = dict(model.named_parameters()), {}
    for output, keys in step.args.get("wrt", {}).items():
        several = isinstance(keys, list)
        named = [next(iter(our_names({key: torch.empty(0)}))) for key in (keys if several else [keys])]
        grads = torch.autograd.grad(loss, [parameters[name] for name in named], retain_graph=True)
        if step.args.get("reduce", {}).get(output) == "l2_norm":
            grads = [grad.norm() for grad in grads]
        answers[output] = torch.stack(list(grads)) if several else grads[0]
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer


def _quantizer(step: Step, codebook: Tensor) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codebook.shape, normalize=step.args.get("l2_norm", True), gradient="normalised")
    with torch.no_grad():
        quantizer.embedding.weight.copy_(codebook)
    return quantizer.train()


@runner("robustok/quantizer", "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    z = step.tensor("z", 0)
    output = _quantizer(step, step.tensor("codebook", 1))(_from_map(z))
    beta = step.args.get("commit_loss_beta", 0.25)
    return step.answers(
        output.ids.flatten(),
        _as_map(output.quantized),
        output.losses["codebook"].mean(),
        beta * output.losses["commitment"].mean(),
    )


def _perturbed_codes(step: Step, share: float, quantizer: VectorQuantizer, latents: Tensor) -> QuantizerOutput:
    quantizer.perturbation = Perturbation(step.args["alpha"], share, step.args["delta"])
    return quantizer(latents, draws=_draws(step.case, len(latents), step.args["delta"]))


@runner("robustok/quantizer", "perturb")
@torch.no_grad()
def perturb_codes(case: Case, step: Step) -> dict[str, Tensor]:
    latents = _from_map(step.tensor("z", 0))
    quantizer, args = _quantizer(step, step.tensor("codebook", 1)), step.args
    strength = min(args["delta"], quantizer.codebook_size)
    neighbours = quantizer.neighbours(latents, strength)
    changed = perturb(neighbours, args["alpha"], strength, _draws(case, len(latents), args["delta"]))
    clean = quantizer.encode(latents)
    answers = {}
    for output, quantity in zip(step.outputs, ("ids", "codes")):
        share = 1.0 if args.get("all_samples", {}).get(output, quantity == "ids") else args["beta"]
        if quantity == "codes":
            answers[output] = _as_map(_perturbed_codes(step, share, quantizer, latents).quantized)
        else:
            rows = int(len(latents) * share)
            answers[output] = torch.cat([changed[:rows], clean[rows:]]).flatten()
    return answers


@runner("robustok/quantizer", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    z = step.tensor("z", 0).requires_grad_()
    quantizer = _quantizer(step, step.tensor("codebook", 1))
    output = _perturbed_codes(step, step.args["beta"], quantizer, _from_map(z))
    terms = {
        "sum(perturbed*weight)": (_as_map(output.quantized) * step.tensor("weight", 4)).sum(),
        "codebook_loss": output.losses["codebook"].mean(),
        "commit_loss": step.args.get("commit_loss_beta", 0.25) * output.losses["commitment"].mean(),
    }
    names = step.args.get("of", "+".join(terms)).replace(" ", "").split("+")
    if unknown := set(names) - terms.keys():
        raise GoldenFailure(f"{step.id}: no terms {', '.join(sorted(unknown))}; there are {', '.join(terms)}")
    loss = sum(terms[name] for name in names)
    tensors = {"(z)": z, "(codebook)": quantizer.embedding.weight}
    return {name: torch.autograd.grad(loss, tensors[of], retain_graph=True)[0] for name, of in step.args["wrt"].items()}


@runner("robustok/quantizer", "schedule")
def schedule(case: Case, step: Step) -> dict[str, Any]:
    args = step.args
    annealing = Annealing(args["anneal_start"], args["anneal_end"], args["end_ratio"])
    ratios = [annealing.ratio(epoch) for epoch in range(args["epochs"])]
    strengths = [Perturbation(strength=args["base_delta"]).scaled(ratio).strength for ratio in ratios]
    return step.answers(torch.tensor(ratios, dtype=torch.float64), torch.tensor(strengths))


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@runner("robustok/losses", "discriminator_loss")
def discriminator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    lecam = LeCam(args.get("lecam_decay", 0.999), update=args.get("lecam_update", "before_use"), compare="logits")
    first = args.get("lecam_init", 0.0)
    lecam.average_real.fill_(first)
    lecam.average_fake.fill_(first)
    game = DiscriminatorLoss(args.get("loss", "hinge"))
    averages = {"real": lecam.average_real, "fake": lecam.average_fake}
    rows: dict[str, list[Tensor]] = {name: [] for name in ("hinge", "lecam", "ema", "d_loss")}
    for real, fake in zip(step.tensor("logits_real", 0), step.tensor("logits_fake", 1)):
        rows["hinge"].append(game(real, fake))
        rows["lecam"].append(lecam(real, fake))
        order = args.get("lecam_ema_order", ["real", "fake"])
        rows["ema"].append(torch.stack([averages[name].clone() for name in order]))
        regularised = args["lecam_weight"] * rows["lecam"][-1] + rows["hinge"][-1]
        rows["d_loss"].append(args["disc_weight"] * regularised)
    return step.answers(*(torch.stack(values) for values in rows.values()))


@runner("robustok/losses", "adaptive_weight")
def adaptive(case: Case, step: Step) -> dict[str, Tensor]:
    weight, acts = step.tensor("last", 0).requires_grad_(), step.tensor("acts", 1)
    y = acts @ weight.T
    nll = F.mse_loss(y, step.tensor("target", 2))
    adversarial = -(torch.tanh(y) * step.tensor("v", 3)).sum(-1).mean()
    low, high = step.args["clamp"]
    return step.answers(adaptive_weight(nll, adversarial, weight, step.args["eps"], (low, high)))


@runner("robustok/losses", "augment")
def augment(case: Case, step: Step) -> dict[str, Tensor]:
    image, uniforms = step.tensor("image", 0), step.tensor("rand7", 1)
    defaults = {"translation": case.config.get("translation", 0.125), "cutout": case.config.get("cutout", 0.2)}
    answers = {}
    for output in step.outputs:
        settings = defaults | dict(step.args[output])
        blur, groups = settings.pop("blur", 0.0), tuple(settings.pop("groups", GROUPS))
        answers[output] = DiffAugment(groups, **settings)(image, uniforms, blur=blur)
    return answers
