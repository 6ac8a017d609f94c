"""Runners of LARP's autoregressive prior, on the codes of the case's tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.checkpoints import rename
from vistok.losses.ar_prior import ARPrior, PriorOutput, Round
from vistok.tokenizers.larp.official import PRIOR_NAMES, build_prior

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner
from .larp_tokenizer import by_quantity, quantized, tokenizer


def _prior(case: Case) -> ARPrior:
    def build() -> ARPrior:
        prior = case.build.get("prior", {"class": "GPTC"})
        if prior["class"] != "GPTC":
            raise GoldenFailure(f"{case.label}: unknown prior {prior['class']!r}")
        return build_prior(case.config, case.state)

    return case.once("prior", build).train(case.build.get("train", False))


@runner("larp/prior", "tokenize")
@torch.no_grad()
def tokenize(case: Case, step: Step) -> dict[str, Tensor]:
    output = quantized(case, step)
    return by_quantity(step, {"ids": output.ids, "quantized": output.quantized})


def _rounds(case: Case, step: Step, codes: Tensor) -> list[Round]:
    """As many rounds as the step has answers for, for straight-through codes (B, n, d)."""
    prior, wanted = _prior(case), step.args.get("passes", step.args.get("passes_in_loss"))
    single = step.has("inverse_cdf_ids") is False  # then only the first pass is asked for
    if single and wanted != [1]:
        raise GoldenFailure(f"{step.id}: passes {wanted} need drawn ids")
    # Without the schedule, all tokens are replaced from the second pass on.
    replaced = torch.full((len(codes), codes.shape[1] - 1), prior.replaced_share(0.0) >= 1)
    if step.has("uniform"):
        progress = int(step.tensor("global_step", 3)) / int(step.tensor("max_steps", 4))
        share = prior.replaced_share(progress)
        if "mix_ratio" in step.args and abs(share - step.args["mix_ratio"]) > 1e-9:
            raise GoldenFailure(f"{step.id}: the share at this step is {share}, not {step.args['mix_ratio']}")
        replaced = step.tensor("uniform", 1).flatten(1) < share
    ids = torch.zeros_like(replaced, dtype=torch.int64)[None] if single else step.tensor("inverse_cdf_ids", 2)
    ids = ids.unsqueeze(0) if ids.ndim == 2 else ids  # one pass change
    ids = ids.expand(max(prior.num_rounds - 1, len(ids)), -1, -1)
    return prior.rounds(
        codes, tokenizer(case).quantizer.codes(), replaced=replaced, draw=lambda index, logits: ids[index]
    )


@runner("larp/prior", "prior_passes")
@torch.no_grad()
def prior_passes(case: Case, step: Step) -> dict[str, Tensor]:
    rounds = _rounds(case, step, quantized(case, step).quantized)
    values = {}
    for number in step.args["passes"]:
        values |= {f"round{number}_input": rounds[number - 1].fed, f"round{number}_pred": rounds[number - 1].predicted}
    return by_quantity(step, values)


def _score(case: Case, step: Step, codes: Tensor) -> PriorOutput:
    prior, ids = _prior(case), quantized(case, step).ids
    counted = list(range(1, prior.num_rounds + 1)) if prior.average_rounds else [prior.num_rounds]
    refuse(step, passes_in_loss=counted, accuracy_pass=counted[0], temperature=prior.temperature, of="loss")
    return prior.score(ids, _rounds(case, step, codes))


@runner("larp/prior", "prior_loss")
@torch.no_grad()
def prior_loss(case: Case, step: Step) -> dict[str, Tensor]:
    output = _score(case, step, quantized(case, step).quantized)
    return by_quantity(step, {"loss": output.loss, "top1_acc": output.top1, "top5_acc": output.top5})


@runner("larp/prior", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    codes = quantized(case, step).quantized.detach().requires_grad_()
    parameters = dict(_prior(case).named_parameters())
    loss = _score(case, step, codes).loss
    return {name: _gradient(loss, key, codes, parameters, step) for name, key in step.args["wrt"].items()}


def _gradient(loss: Tensor, key: str, codes: Tensor, parameters: dict[str, Tensor], step: Step) -> Tensor:
    if isinstance(key, list):
        return torch.stack([_gradient(loss, one, codes, parameters, step) for one in key])
    if key == "(quantized)":
        return torch.autograd.grad(loss, codes, retain_graph=True)[0]
    official = key.removeprefix("prior_model.")
    part = next((part for part in ("query", "key", "value") if f".attn.{part}." in official), None)
    if part is not None:  # one third of the fused projection
        official = official.replace(f".attn.{part}.", ".attn.qkv.")
    (ours,) = rename({official: None}, PRIOR_NAMES)
    if ours not in parameters:
        raise GoldenFailure(f"{step.id}: no parameter {ours!r} stands for {key!r}")
    (gradient,) = torch.autograd.grad(loss, parameters[ours], retain_graph=True)
    gradient = gradient if part is None else gradient.chunk(3)[("query", "key", "value").index(part)]
    return gradient[None] if ours == "positions" else gradient
