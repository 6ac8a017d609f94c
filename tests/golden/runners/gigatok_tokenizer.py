"""Runners of GigaTok's tokenizer, its losses and its learning rates. Golden pixels are in [-1, 1]."""

from __future__ import annotations

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import vistok
from vistok.losses import L1, L2, DiscriminatorLoss, EntropyLoss, GeneratorLoss, PatchGAN, alignment_distance
from vistok.tokenizers.gigatok import GigaTok
from vistok.tokenizers.gigatok.networks import pool_levels
from vistok.tokenizers.gigatok.official import ENTROPY_TEMPERATURE, our_names
from vistok.train.config import SchedulerConfig
from vistok.train.optim import lr_factor
from vistok.types import TokenizerOutput

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner

MODEL = "gigatok/tokenizer"
GRADIENTS = {"rotation": "rotation", "straight_through": "normalised"}


def _tokenizer(case: Case, step: Step) -> GigaTok:
    refuse_dropout = case.build.get("dropout", 0.0)
    if refuse_dropout:
        raise GoldenFailure(f"{step.id}: build.dropout {refuse_dropout} leaves the answer to chance")
    prefixes = tuple(case.build.get("state_prefixes", {}))
    own = {key: tensor for key, tensor in case.state.items() if not (prefixes and key.startswith(prefixes))}
    model = case.once("model", lambda: vistok.from_official(case.model, case.config, own))
    return model.train(step.args.get("train", case.build.get("train", False)))


def _as_map(model: GigaTok, tokens: Tensor) -> Tensor:
    """Tokens (B, L, D), channels first: (B, D, h, w) of a raster, (B, D, 1, L) of a sequence."""
    h = model.spec.grid[0] if model.spec.grid else 1
    return rearrange(tokens, "b (h w) d -> b d h w", h=h)


@runner(MODEL, "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model = _tokenizer(case, step)
    spatial = model.encode_map(step.tensor("image", 0))
    features, latents = model.token_encoder.features(spatial), model.map_latents(spatial)
    return step.answers(spatial, _as_map(model, features), _as_map(model, latents))


@runner(MODEL, "tokenize")
@torch.no_grad()
def tokenize(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_tokenizer(case, step).encode(step.tensor("image", 0)))


@runner(MODEL, "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    model = _tokenizer(case, step)
    latents = model.latents(step.tensor("image", 0))
    config = model.config
    own, asked = config["quantizer_gradient"], GRADIENTS[step.args["gradient"]]
    if own != asked:
        model = GigaTok(**config | {"quantizer_gradient": asked})
        model.quantizer.embedding = case.once("model", dict).quantizer.embedding
    return step.answers(_as_map(model, model.quantizer(latents).quantized))


def _ids(model: GigaTok, step: Step) -> Tensor:
    refuse(step, **{"from": "ids"})
    name = step.inputs[0].partition(" (")[0]  # a remark may follow
    return step.case.tensor(name).reshape(-1, model.spec.length)


@runner(MODEL, "decode_features")
@torch.no_grad()
def decode_features(case: Case, step: Step) -> dict[str, Tensor]:
    model = _tokenizer(case, step)
    codes = model.quantizer.ids_to_latents(_ids(model, step))
    decoder = copy.copy(model.token_decoder)
    decoder.tap = step.args.get("distill_depth") or decoder.tap  # the reference may read the head at another layer
    decoded = decoder(model.post_quant(codes))
    return step.answers(_as_map(model, codes), decoded.spatial, decoded.aligned)


@runner(MODEL, "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    model = _tokenizer(case, step)
    pixels = model.decode(_ids(model, step))
    return step.answers(pixels.clamp(-1, 1) if step.args["clamp"] else pixels)


@runner(MODEL, "pool_queries")
@torch.no_grad()
def pool_queries(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, split_first="columns")
    tokens = step.args["tokens"]
    if step.args.get("levels", tokens.bit_length() - 1) != tokens.bit_length() - 1:
        raise GoldenFailure(f"{step.id}: {step.args['levels']} levels do not make {tokens} tokens")
    return step.answers(pool_levels(step.tensor("map", 0), tokens))


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def _code_losses(model: GigaTok, output: TokenizerOutput, settings: dict[str, Any], teacher: Tensor | None) -> dict:
    terms = {
        "vq_loss": output.losses["codebook"].mean(),
        "commit_loss": settings["commit_loss_beta"] * output.losses["commitment"].mean(),
        "entropy_loss": torch.zeros(()),
        "fea_rec_loss": settings["feature_weight"] * output.losses["feature"],
    }
    if ratio := settings["entropy_loss_ratio"]:
        entropy = output.losses.get("entropy")
        if entropy is None:
            entropy = EntropyLoss(ENTROPY_TEMPERATURE)(model.quantizer.distances(output.features["latents"]))
        terms["entropy_loss"] = ratio * entropy
    if teacher is not None:
        # The reference's distance is -cosine, of which ours is the same plus 1.
        terms["proj_loss"] = alignment_distance(output.features["alignment"], teacher).mean() - 1
    return terms


def _settings(case: Case, step: Step) -> dict[str, Any]:
    """The config's weights of losses, under the names of the ``quantizer_loss`` operation, and the step's over them."""
    init, loss = case.config["init_args"], case.config.get("loss", {})
    given = {
        "commit_loss_beta": init.get("commit_loss_beta", 0.25),
        "entropy_loss_ratio": init.get("entropy_loss_ratio", 0.0),
        "feature_weight": init.get("fea_rec_loss_weight", 1.0),
    }
    return loss | given | step.args


@runner(MODEL, "quantizer_loss")
@torch.no_grad()
def quantizer_loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, settings = _tokenizer(case, step), _settings(case, step)
    terms = _code_losses(model, model(step.tensor("image", 0)), settings, step.tensor("sem_feat", 1))
    terms["proj_loss"] = settings["proj_weight"] * terms["proj_loss"]
    return step.answers(
        *(terms[name] for name in ("vq_loss", "commit_loss", "entropy_loss", "fea_rec_loss", "proj_loss"))
    )


def _perceptual(case: Case, step: Step):
    """What stands for LPIPS: one number per image."""
    match case.build.get("perceptual", "mean_abs_difference"):
        case "mean_abs_difference":
            return lambda a, b: (a - b).abs().flatten(1).mean(1)
        case name:
            raise GoldenFailure(f"{step.id}: unknown stand-in for the perceptual loss: {name!r}")


def _discriminator(case: Case, step: Step) -> PatchGAN:
    loss = case.config["loss"]
    if loss.get("disc_type", "patchgan") != "patchgan":
        raise GoldenFailure(f"{step.id}: disc_type {loss['disc_type']!r} is not computed, only 'patchgan'")
    (prefix,) = (key for key, part in case.build["state_prefixes"].items() if part == "discriminator")

    def build() -> PatchGAN:
        state = {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}
        layers = sum(tensor.ndim == 4 for tensor in state.values()) - 2
        model = PatchGAN(
            width=loss.get("disc_dim", 64),
            num_layers=layers,
            norm=loss.get("norm", "batch"),
            kernel_size=loss.get("kw", 4),
        )
        model.load_state_dict(state)
        return model

    return case.once("discriminator", build).train(step.args.get("train", case.build.get("train", False)))


def _kind(name: str) -> str:
    return {"non-saturating": "non_saturating"}.get(name, name)


def _generator_terms(case: Case, step: Step) -> dict[str, Tensor]:
    model, settings, image = _tokenizer(case, step), _settings(case, step), step.tensor("image", 0)
    weights, pixel_loss = settings["weights"], {"l1": L1(), "l2": L2()}[settings["reconstruction"]]
    output = model(image)
    teacher = step.tensor("sem_feat", 1) if len(step.inputs) > 1 else None
    terms = _code_losses(model, output, settings, teacher)
    if not settings["aux"]:
        terms["fea_rec_loss"] = torch.zeros(())
    reconstructions = {"rec": output.reconstruction}
    if settings["aux"] and case.config["loss"].get("use_direct_rec_loss", True):
        reconstructions["direct_rec"] = model.decoder(output.features["spatial"])
    total = weights["quantizer"] * (terms["vq_loss"] + terms["commit_loss"] + terms["entropy_loss"])
    total = total + weights["feature"] * terms["fea_rec_loss"]
    if teacher is not None:
        total = total + weights["proj"] * terms["proj_loss"]
    perceptual = _perceptual(case, step)
    for name, pixels in reconstructions.items():
        terms[f"{name}_mse"] = L2()(pixels, image)
        total = total + weights["reconstruction"] * pixel_loss(pixels, image)
        total = total + weights["perceptual"] * perceptual(pixels, image).mean()
        if settings["adversarial"]:
            logits = _discriminator(case, step)(pixels)
            adversarial = GeneratorLoss(_kind(settings.get("gen_adv_loss", "hinge")))(logits)
            total = total + weights["adversarial"] * adversarial
            if name == "rec":
                terms |= {"logits_fake_mean": logits.mean(), "generator_adv_loss": adversarial}
    return terms | {"total": total}


@runner(MODEL, "generator_loss")
@torch.no_grad()
def generator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    terms, returns = _generator_terms(case, step), step.args.get("returns", {})
    return {name: terms[returns.get(name, name)] for name in step.outputs}


@runner(MODEL, "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    terms = _generator_terms(case, step)
    value = terms[step.args["of"]]
    parameters = dict(_tokenizer(case, step).named_parameters())
    answers = {}
    for name, keys in step.args["wrt"].items():
        asked = [keys] if isinstance(keys, str) else keys
        found = [_gradient(step, value, parameters, key, case.shapes[key]) for key in asked]
        answers[name] = found[0] if isinstance(keys, str) else torch.stack(found)
    reduced = step.args.get("reduce", {})
    return {name: answer.norm() if reduced.get(name) == "l2_norm" else answer for name, answer in answers.items()}


def _gradient(step: Step, value: Tensor, parameters: dict[str, Tensor], key: str, shape: list[int]) -> Tensor:
    """The gradient for the reference's parameter ``key``, whose parts may be several of ours, stacked on axis 0."""
    ours = our_names({key: torch.empty(shape, device="meta")})
    if missing := ours.keys() - parameters.keys():
        raise GoldenFailure(f"{step.id}: no parameters {', '.join(missing)} stand for {key!r}")
    parts = torch.autograd.grad(value, [parameters[name] for name in ours], retain_graph=True)
    return torch.cat(parts).reshape(shape)


@runner(MODEL, "discriminator_loss")
def discriminator_loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _tokenizer(case, step), step.tensor("image", 0)
    discriminator, loss = _discriminator(case, step), DiscriminatorLoss(_kind(step.args.get("loss", "hinge")))
    with torch.no_grad():
        output = model(image)
        fakes = [output.reconstruction]
        if step.args.get("aux", False):
            fakes.append(model.decoder(output.features["spatial"]))
    value = sum(step.args["weight"] * loss(discriminator(image), discriminator(fake)) for fake in fakes)
    parameters = {f"discriminator.{name}": p for name, p in discriminator.named_parameters()}
    returns, wrt = step.args.get("returns", {}), step.args.get("wrt", {})
    answers = {}
    for name in step.outputs:
        if name in wrt:
            (answers[name],) = torch.autograd.grad(value, parameters[wrt[name]], retain_graph=True)
        elif returns.get(name, "loss") == "loss":
            answers[name] = value
        else:
            raise GoldenFailure(f"{step.id}: {returns[name]!r} is not computed")
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


@runner(MODEL, "schedule")
def schedule(case: Case, step: Step) -> dict[str, Tensor]:
    return {name: _rates(step, settings) for name, settings in step.args.items() if name in step.outputs}


def _rates(step: Step, settings: dict[str, Any]) -> Tensor:
    base = settings["base_lr"]
    match settings["kind"]:
        case "wsd":
            tail = {"decay_share": settings.get("fract_decay", 0.2), "decay_shape": "sqrt"}
            config = SchedulerConfig("wsd", settings["warmup_steps"], **tail, warmup_from=0.01)
        case "cosine_v2":
            final = settings.get("end_lr", 0.0) / base
            config = SchedulerConfig("cosine", settings["warmup_steps"], final_factor=final, warmup_from=0.01)
        case kind:
            raise GoldenFailure(f"{step.id}: unknown kind {kind!r}")
    factor = lr_factor(config, settings["total_steps"] + 1)  # the reference's last step is one more than are taken
    steps = range(settings["first_step"], settings["last_step"] + 1)
    return torch.tensor([base * factor(number) * settings.get("times", 1.0) for number in steps])
