"""Runners of VAR's tokenizer and of its multi-scale quantizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.checkpoints import load_strictly
from vistok.quantizers.multiscale import (
    MultiScaleQuantizer,
    ScaleExpander,
    as_grids,
    refiner_of_scales,
)
from vistok.tokenizers.var_vq import VARVQ, official

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner


def _quantizer(case: Case, step: Step) -> MultiScaleQuantizer:
    """The quantizer of a case of it alone, or of a tokenizer."""
    if case.model == "var/tokenizer":
        return case.build_model().train(step.args.get("train", False)).quantizer
    return case.once("quantizer", lambda: _build_quantizer(case)).train(step.args.get("train", False))


def _build_quantizer(case: Case) -> MultiScaleQuantizer:
    config = dict(case.config)
    share, scales = config.pop("share_quant_resi", 4), config.pop("v_patch_nums")
    config.pop("beta", None)  # each step says it
    quantizer = MultiScaleQuantizer(
        config.pop("vocab_size"),
        config.pop("Cvae"),
        scales,
        num_refiners=official.number_of_refiners(share, len(scales), config.pop("default_qresi_counts", 0)),
        refiner_share=abs(config.pop("quant_resi", 0.5)),
        cosine=config.pop("using_znorm", False),
    )
    if config:
        raise GoldenFailure(f"{case.label}: unknown keys of the config: {', '.join(config)}")
    load_strictly(quantizer, {_ours(key): value for key, value in case.state.items() if key != "ema_vocab_hit_SV"})
    return quantizer.eval()


def _ours(key: str) -> str:
    """Our name of a quantizer's key."""
    (name,) = official.our_names({f"quantize.{key}": torch.empty(0)})
    return name.removeprefix("quantizer.")


def _scales(case: Case, step: Step, config_key: str = "v_patch_nums") -> tuple[tuple[int, int], ...]:
    return as_grids(step.args.get("patch_nums", case.config[config_key]))


def _latents(case: Case, step: Step) -> Tensor:
    values = step.tensor("f", 0)
    if case.model == "var/quantizer":
        return values
    model = case.build_model()
    return model.pre_quant(model.encoder(values))


@runner("var/tokenizer", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = case.build_model(), step.tensor("image", 0)
    encoded = model.encoder(image)
    return step.answers(encoded, model.pre_quant(encoded))


@runner("var/tokenizer", "encode")
@runner("var/quantizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    scales = _scales(case, step)
    quantizer, latents = _quantizer(case, step), _latents(case, step)
    ids = quantizer.encode(latents, scales)
    if case.model == "var/tokenizer" and scales == quantizer.scales and step.has("image"):
        assert torch.equal(case.build_model().encode(step.tensor("image", 0)), ids)
    return step.answers(ids)


@runner("var/tokenizer", "f_hats")
@runner("var/quantizer", "f_hats")
@torch.no_grad()
def f_hats(case: Case, step: Step) -> dict[str, Tensor]:
    levels = _quantizer(case, step).levels(_latents(case, step), _scales(case, step))
    return step.answers(torch.stack([so_far for _, _, so_far in levels]))


def with_scales(quantizer: MultiScaleQuantizer, scales: Sequence[tuple[int, int]]) -> MultiScaleQuantizer:
    """The quantizer with another schedule, weights shared."""
    if tuple(scales) == quantizer.scales:
        return quantizer
    other = MultiScaleQuantizer(
        quantizer.codebook_size,
        quantizer.dim,
        scales,
        num_refiners=max(len(quantizer.refiners), 1),
        refiner_share=quantizer.refiners[0].share if quantizer.refiners else 0.0,
        cosine=quantizer.codebook.normalize,
    )
    other.load_state_dict(quantizer.state_dict())
    return other


@runner("var/tokenizer", "var_input")
@runner("var/quantizer", "var_input")
@torch.no_grad()
def var_input(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer = with_scales(_quantizer(case, step), _scales(case, step))
    return step.answers(ScaleExpander(quantizer).expand(step.tensor("ids", 0)))


@runner("var/tokenizer", "next_inputs")
@runner("var/quantizer", "next_inputs")
@torch.no_grad()
def next_inputs(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer = with_scales(_quantizer(case, step), _scales(case, step))
    expander = ScaleExpander(quantizer)
    parts = step.tensor("ids", 0).split([h * w for h, w in quantizer.scales], 1)
    inputs = [expander.step(part) for part in parts]
    return step.answers(torch.cat(inputs, 1), expander.so_far)


@runner("var/tokenizer", "lookup")
@runner("var/quantizer", "lookup")
@torch.no_grad()
def lookup(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_quantizer(case, step).decode(step.tensor("ids", 0), _scales(case, step)))


@runner("var/tokenizer", "phi_index")
@runner("var/quantizer", "phi_index")
def phi_index(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    scales = args["scales"]
    count = official.number_of_refiners(args["share_quant_resi"], scales, args.get("default_qresi_counts", 0))
    return step.answers(torch.tensor(refiner_of_scales(scales, count)))


@runner("var/tokenizer", "code_counts")
@runner("var/quantizer", "code_counts")
@torch.no_grad()
def code_counts(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer = _quantizer(case, step)
    levels = quantizer.levels(_latents(case, step), _scales(case, step))
    counts = [torch.bincount(ids.flatten(), minlength=quantizer.codebook_size) for _, ids, _ in levels]
    return step.answers(torch.stack(counts))


def _weighted(losses: dict[str, Tensor], step: Step, case: Case) -> Tensor:
    beta = step.args.get("commit_loss_beta", case.config.get("beta", 0.25))
    return losses["codebook"].mean() + beta * losses["commitment"].mean()


def _gradients(step: Step, value: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    """Gradients in the order of ``wrt``; ``given`` are the tensors that it can name."""
    keys = list(step.args["wrt"].values())
    missing = [key for key in keys if key not in given]
    if missing:
        raise GoldenFailure(f"{step.id}: no gradient of {', '.join(missing)}")
    groups = [value_ if isinstance(value_, list) else [value_] for value_ in (given[key] for key in keys)]
    flat = torch.autograd.grad(value, [tensor for group in groups for tensor in group], allow_unused=True)
    flat = [torch.zeros_like(t) if g is None else g for g, t in zip(flat, [t for group in groups for t in group])]
    answers = []
    for group in groups:
        part, flat = flat[: len(group)], flat[len(group) :]
        answers.append(torch.cat(part) if len(part) > 1 else part[0])
    return answers


@runner("var/quantizer", "quantize")
@torch.no_grad()
def quantize(case: Case, step: Step) -> dict[str, Tensor]:
    output = _quantizer(case, step)(step.tensor("f", 0))
    return step.answers(output.quantized, _weighted(output.losses, step, case))


@runner("var/quantizer", "gradients")
def quantizer_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, of="sum(quant * g) + vq_loss")
    quantizer, latents = _quantizer(case, step), step.tensor("f", 0).requires_grad_()
    output = quantizer(latents)
    value = (output.quantized * step.tensor("g", 1)).sum() + _weighted(output.losses, step, case)
    parameters = dict(quantizer.named_parameters())
    ours = {key: _ours(key) for key in case.shapes if key != "ema_vocab_hit_SV"}
    given = {key: parameters[name] for key, name in ours.items()} | {"(f)": latents}
    return step.answers(*_gradients(step, value, given))


# ---------------------------------------------------------------------------------------------------------------------
# The whole tokenizer


def _clamped(step: Step, pixels: Tensor) -> Tensor:
    clamp = step.args.get("clamp")
    return pixels.clamp(*((-1, 1) if clamp is True else clamp)) if clamp else pixels


@runner("var/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_clamped(step, case.build_model().decode(step.tensor("ids", 0))))


@runner("var/tokenizer", "decode_scales")
@torch.no_grad()
def decode_scales(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_clamped(step, case.build_model().decode_scales(step.tensor("ids", 0))))


@runner("var/tokenizer", "reconstruct")
@torch.no_grad()
def reconstruct(case: Case, step: Step) -> dict[str, Tensor]:
    model: VARVQ = case.build_model().train(step.args.get("train", False))
    output = model(step.tensor("image", 0))
    return step.answers(_clamped(step, output.reconstruction), _weighted(output.losses, step, case))


def official_tensors(case: Case, parameters: dict[str, nn.Parameter], prefix: str = "") -> dict[str, Tensor | list]:
    """Our parameters by the names of the reference; a list where one of its tensors is several of ours."""
    found = {}
    for key in case.shapes:
        if key.startswith(prefix):
            names = official.our_names({key.removeprefix(prefix): torch.empty(3, device="meta")})
            if names and all(name in parameters for name in names):
                found[key] = [parameters[name] for name in names] if len(names) > 1 else parameters[next(iter(names))]
    return found


@runner("var/tokenizer", "gradients")
def tokenizer_gradients(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, rec_loss="mse")
    model: VARVQ = case.build_model().train(step.args.get("train", False))
    image, args = step.tensor("image", 0).requires_grad_(), step.args
    output = model(image)
    error = (output.reconstruction - image.detach()).pow(2).mean()
    value = args.get("rec_weight", 1.0) * error + args.get("quant_weight", 1.0) * _weighted(output.losses, step, case)
    given = official_tensors(case, dict(model.named_parameters())) | {"(image)": image}
    gradients = dict(zip(args["wrt"], _gradients(step, value, given)))
    return {output: gradients.get(output, value) for output in step.outputs}
