"""Runners of TiTok, TA-TiTok and the MaskGIT-VQGAN codec. Golden pixels are in [0, 1], latents (B, C, 1, N)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import vistok
from vistok.losses import L1, L2
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.gaussian import LOG_VARIANCE, gaussian_kl
from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.tokenizers.titok import TATiTok, TiTok
from vistok.types import Condition, QuantizerOutput

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case, step: Step) -> TiTok | TATiTok:
    prefixes = tuple(case.build.get("state_prefixes", {}))
    own = {key: tensor for key, tensor in case.state.items() if not key.startswith(prefixes)}
    model = case.once("model", lambda: vistok.from_official(case.model, case.config, own))
    return model.train(step.args.get("train", case.build.get("train", False)))


def _codec(case: Case) -> MaskGITVQGAN:
    """The codec of a case, whose keys are those of one of its state prefixes."""
    prefix = next((key for key, part in case.build.get("state_prefixes", {}).items() if "codec" in part), None)
    if prefix is None:
        return case.build_model()  # a case of the codec alone
    state = {key.removeprefix(prefix): tensor for key, tensor in case.state.items() if key.startswith(prefix)}
    sizes = case.config.get("overrides", {})
    pixel = sizes.get("pixel", {})
    config = pixel | {
        "num_embeddings": sizes.get("proxy_codes", 1024),
        "embedding_dim": pixel.get("z_channels", 256),
        "num_resolutions": len(pixel.get("channel_mult", [1, 1, 2, 2, 4])),
        "resolution": case.config["dataset"]["preprocessing"]["crop_size"],
    }
    return case.once("codec", lambda: vistok.from_official("titok/codec", config, state))


def _as_map(latents: Tensor) -> Tensor:
    return rearrange(latents, "b n c -> b c 1 n")


def _from_map(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c 1 n -> b n c")


def _public(image: Tensor) -> Tensor:
    return image * 2 - 1


def _native(pixels: Tensor) -> Tensor:
    return (pixels + 1) / 2


def _quantized(step: Step, model: TiTok, image: Tensor) -> QuantizerOutput:
    _check(step, "l2_norm", model.quantizer.normalize)
    return model.quantizer(model.latents(_public(image)))


def _check(step: Step, name: str, value: Any) -> None:
    """Raise GoldenFailure if the step states another value of a setting than the model has."""
    if step.args.get(name, value) != value:
        raise GoldenFailure(f"{step.id}: {name} {step.args[name]!r} differs from the model's {value!r}")


def _named(step: Step, values: Mapping[str, Any]) -> dict[str, Any]:
    """The step's outputs from quantities by name: an output's own, or that which ``returns`` maps it to."""
    returns = step.args.get("returns", {})
    answers = {}
    for output in step.outputs:
        name = returns.get(output, output)
        if name not in values and len(values) == 1:
            name = next(iter(values))
        if name not in values:
            raise GoldenFailure(f"{step.id}: there is no quantity {name!r}; there are {', '.join(values)}")
        answers[output] = values[name]
    return answers


def _clamped(step: Step, name: str, pixels: Tensor) -> Tensor:
    """The pixels as the output ``name`` wants them: ``clamp`` is false, or {output: [low, high]}."""
    clamp = step.args.get("clamp", False)
    return pixels.clamp(*clamp[name]) if clamp and name in clamp else pixels


def _gradients(step: Step, loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of ``loss`` that ``wrt`` asks for, each a key or a list of keys, reduced as ``reduce`` says."""
    answers = {}
    for output, keys in step.args.get("wrt", {}).items():
        norm = step.args.get("reduce", {}).get(output) == "l2_norm"
        several = isinstance(keys, list)
        chosen = [parameters[key] for key in (keys if several else [keys])]
        grads = torch.autograd.grad(loss, chosen, retain_graph=True)
        grads = [grad.norm() if norm else grad for grad in grads]
        answers[output] = torch.stack(grads) if several else grads[0]
    return answers


class _ByOfficialKey(Mapping):
    """The parameters of a model by the keys of the reference's state dict, found by renaming a marked one."""

    def __init__(self, model: nn.Module, our_names, keys):
        self._own, self._keys = dict(model.named_parameters()), list(keys)
        marks = {key: torch.tensor(float(index)) for index, key in enumerate(self._keys)}
        self._names = {self._keys[int(mark)]: name for name, mark in our_names(marks).items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._own[self._names[key]]

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _parameters(case: Case, model: TiTok) -> Mapping[str, Tensor]:
    from vistok.tokenizers.titok.official import our_names

    levels = len(case.config.get("overrides", {}).get("pixel", {}).get("channel_mult", [1, 1, 2, 2, 4]))
    return _ByOfficialKey(model, lambda state: our_names(state, levels), case.state)


# ---------------------------------------------------------------------------------------------------------------------
# TiTok


@runner("titok/tokenizer", "encode")
@runner("tatitok/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_as_map(_model(case, step).latents(_public(step.tensor("image", 0)))))


@runner("titok/tokenizer", "tokenize")
@torch.no_grad()
def tokenize(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_model(case, step).encode(_public(step.tensor("image", 0)))[:, None])


@runner("titok/tokenizer", "quantize")
@torch.no_grad()
def quantize_titok(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _model(case, step), step.tensor("image", 0)
    return step.answers(_as_map(_quantized(step, model, image).quantized))


def _decoder_input(case: Case, step: Step, model: TiTok) -> Tensor:
    """Latents (B, N, C) of what ``from`` names: codes, ids, or the image."""
    source = step.args.get("from", "z_q")
    image = step.tensor("image", 0)
    if source == "ids":
        return model.quantizer.ids_to_latents(model.encode(_public(image)))
    if source in ("z_q", "image"):
        return model.quantizer(model.latents(_public(image))).quantized
    raise GoldenFailure(f"{step.id}: decoding from {source!r} is not computed, only from z_q, ids or image")


@runner("titok/tokenizer", "proxy_logits")
@torch.no_grad()
def proxy_logits(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    logits = model.head(model.decode_latents(_decoder_input(case, step, model)))
    return step.answers(rearrange(logits, "b (h w) k -> b k h w", h=model.decoder_grid[0]))


@runner("titok/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    pixels = _native(model.render(model.decode_latents(_decoder_input(case, step, model))))
    return {name: _clamped(step, name, pixels) for name in step.outputs}


@runner("titok/tokenizer", "proxy_codec")
@runner("titok/codec", "proxy_codec")
@torch.no_grad()
def proxy_codec(case: Case, step: Step) -> dict[str, Tensor]:
    codec, image = _codec(case), step.tensor("image", 0)
    hidden, ids = codec.encoder(image), codec.encode(_public(image))
    pixels = _native(codec.decode(ids, grid=tuple(hidden.shape[2:])))
    values = {"proxy_hidden": hidden, "proxy_codes": ids}
    returns = step.args.get("returns", {})
    return {name: values.get(returns.get(name, name), _clamped(step, name, pixels)) for name in step.outputs}


@runner("titok/tokenizer", "stage1_loss")
def stage1_loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _model(case, step), step.tensor("image", 0)
    with torch.no_grad():
        target = _codec(case).encode(_public(image))
    output = model(_public(image))
    weights, beta = step.args["weights"], step.args["commit_loss_beta"]
    ce = F.cross_entropy(output.features["code_logits"].mT, target)
    commit, codebook = beta * output.losses["commitment"].mean(), output.losses["codebook"].mean()
    loss = weights.get("cross_entropy", 1.0) * ce + weights.get("quantizer", 1.0) * (commit + codebook)
    values = {"loss": loss, "ce": ce, "commit": commit, "codebook": codebook}
    return _named(step, values | _gradients(step, loss, _parameters(case, model)))


@runner("titok/tokenizer", "clustering_update")
@torch.no_grad()
def clustering_update(case: Case, step: Step) -> dict[str, Tensor]:
    config, z = case.config, step.tensor("z", 0)
    prefix = case.build.get("state_prefix", "") if "quantize.embedding.weight" in case.state else ""
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["token_size"],
        normalize=step.args.get("l2_norm", config.get("use_l2_norm", False)),
        gradient="normalised",
        clustering=config.get("clustering_vq", True),
    )
    quantizer.embedding.weight.copy_(case.state[f"{prefix}embedding.weight"])
    quantizer.clustering.usage.copy_(case.state[f"{prefix}embed_prob"])
    quantizer.train(step.args.get("train", True))
    rows: dict[str, list[Tensor]] = {name: [] for name in ("ids", "codebook_after", "embed_prob_after", "loss")}
    for batch in z[: step.args.get("updates", len(z))]:
        output = quantizer(_from_map(batch))
        terms = {name: term.mean() for name, term in output.losses.items()}
        rows["loss"].append(step.args["commit_loss_beta"] * terms["commitment"] + terms["codebook"])
        quantizer.after_backward()
        rows["ids"].append(output.ids[:, None])
        rows["codebook_after"].append(quantizer.embedding.weight.clone())
        rows["embed_prob_after"].append(quantizer.clustering.usage.clone())
    return _named(step, {name: torch.stack(values) for name, values in rows.items()})


# ---------------------------------------------------------------------------------------------------------------------
# TA-TiTok


def _tatitok_latents(case: Case, step: Step, model: TATiTok) -> dict[str, Any]:
    """The quantities of the bottleneck by name; latents are (B, N, C)."""
    hidden = model.latents(_public(step.tensor("image", 0)))
    mode = step.args.get("quantize_mode", case.config["model"]["vq_model"].get("quantize_mode", "vq"))
    if model.has_posterior != (mode == "vae"):
        raise GoldenFailure(f"{step.id}: quantize_mode {mode!r} is not the model's")
    if model.has_posterior:
        _check(step, "logvar_clamp", list(LOG_VARIANCE))
        mean, logvar = model.gaussian.moments(hidden)
        draws = {"posterior": _from_map(case.tensor("noise"))} if "noise" in step.inputs else None
        kl = gaussian_kl(mean, logvar).sum(-1)
        return {"mean": mean, "logvar": logvar, "kl": kl, "sample": model.gaussian.choose(mean, logvar, draws)}
    _check(step, "l2_norm", model.quantizer.normalize)
    output = model.quantizer(hidden)
    beta = step.args.get("commit_loss_beta", case.config["model"]["vq_model"].get("commitment_cost", 0.25))
    return {
        "ids": output.ids,
        "sample": output.quantized,
        "commit": beta * output.losses["commitment"].mean(),
        "codebook": output.losses["codebook"].mean(),
    }


@runner("tatitok/tokenizer", "quantize")
@torch.no_grad()
def quantize_tatitok(case: Case, step: Step) -> dict[str, Tensor]:
    values = _tatitok_latents(case, step, _model(case, step))
    maps = {name: _as_map(value) if name in ("mean", "logvar", "sample") else value for name, value in values.items()}
    if "ids" in maps:
        maps["ids"] = maps["ids"][:, None]
    return _named(step, maps)


def _tatitok_pixels(case: Case, step: Step, model: TATiTok, latents: Tensor) -> Tensor:
    text = Condition.from_features(case.tensor("text")) if step.has("text") else None
    return _native(model.render(model.decode_latents(latents, text)))


@runner("tatitok/tokenizer", "decode")
@torch.no_grad()
def decode_tatitok(case: Case, step: Step) -> dict[str, Tensor]:
    _check(step, "from", "sample")
    model = _model(case, step)
    pixels = _tatitok_pixels(case, step, model, _tatitok_latents(case, step, model)["sample"])
    return {name: _clamped(step, name, pixels) for name in step.outputs}


@runner("tatitok/tokenizer", "loss")
def loss_tatitok(case: Case, step: Step) -> dict[str, Tensor]:
    weights = step.args["weights"]
    unbuilt = [name for name in ("perceptual", "adversarial") if weights.get(name, 0)]
    if unbuilt:
        raise GoldenFailure(f"{step.id}: weights of {unbuilt} need networks that this case does not have")
    model, image = _model(case, step), step.tensor("image", 0)
    values = _tatitok_latents(case, step, model)
    pixels = _tatitok_pixels(case, step, model, values["sample"])
    distance = {"l1": L1(), "l2": L2()}[step.args.get("reconstruction", "l2")]
    recon = weights.get("reconstruction", 1.0) * distance(pixels, image)
    if model.has_posterior:
        kl = values["kl"].sum(1).mean()
        loss = recon + weights.get("kl", 0.0) * kl
        terms = {"kl": kl}
    else:
        terms = {"commit": values["commit"], "codebook": values["codebook"]}
        loss = recon + weights.get("quantizer", 1.0) * (values["commit"] + values["codebook"])
    terms |= {"loss": loss, "recon_loss": recon}
    return _named(step, terms | _gradients(step, loss, _parameters(case, model)))
