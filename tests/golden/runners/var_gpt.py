"""Runners of VAR's transformer."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch
import yaml
from torch import Tensor

import vistok
from vistok.data.masks import box_mask, scale_masks
from vistok.generators.engine.sampling import draw_ids, filter_logits
from vistok.generators.var import VAR, VAROptions
from vistok.generators.var.model import stage_warmth
from vistok.generators.var.official import our_names
from vistok.generators.var.smooth import GUMBEL
from vistok.quantizers.multiscale import ScaleExpander, as_grids
from vistok.tokenizers.var_vq import VARVQ
from vistok.train.config import OptimizerConfig, SchedulerConfig
from vistok.train.optim import build_optimizer, decay_factor, lr_factor
from vistok.types import Condition

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner
from .var_tokenizer import with_scales

CONFIG = Path(__file__).parents[3] / "vistok" / "train" / "configs" / "imagenet256" / "var_d16.yaml"


def _prefix(case: Case) -> str:
    """What the keys of the tokenizer begin with."""
    return next(prefix for prefix, name in case.build["state_prefixes"].items() if name == "var/tokenizer")


def _model(case: Case, step: Step) -> VAR:
    state = {key: value for key, value in case.state.items() if not key.startswith(_prefix(case))}
    model = case.once("var", lambda: vistok.from_official("var/gpt", case.config, state))
    model.label_smoothing = step.args.get("label_smoothing", 0.0)
    return model.train(step.args.get("train", model.label_smoothing > 0))


def _tokenizer(case: Case) -> VARVQ:
    prefix = _prefix(case)
    state = {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}
    return case.once(
        "tokenizer", lambda: vistok.from_official("var/tokenizer", case.build["tokenizer_config"], state)
    ).eval()


def _condition(step: Step, labels: Tensor, drop_u: Tensor | None, num_classes: int) -> Condition:
    """Labels; rows of the null class where the step's draw says so, or where the label is the null class."""
    condition = Condition.from_labels(torch.where(labels == num_classes, 0, labels)).drop(labels == num_classes)
    rate = step.args.get("cond_drop_rate", 0.0)
    return condition if drop_u is None or not rate else condition.drop(drop_u < rate)


def _given(case: Case, step: Step, row: int | None = None) -> tuple[Tensor, Condition]:
    """ids, and the condition; of one batch of several."""
    ids, labels = step.tensor("ids", 0).long(), step.tensor("label", 1)
    drop_u = step.tensor("drop_u", 2) if len(step.inputs) > 2 else None
    if row is not None:
        ids, labels, drop_u = ids[row], labels[row], None if drop_u is None else drop_u[row]
    return ids, _condition(step, labels, drop_u, case.config.get("num_classes", 1000))


def _of_scales(case: Case, step: Step) -> VAR:
    """The case's model, or a small one if the step has another schedule of scales."""
    model, scales = _model(case, step), as_grids(step.args.get("patch_nums", case.config["patch_nums"]))
    if scales == model.spec.scales:
        return model
    spec = {"length": sum(h * w for h, w in scales), "codebook_size": 4, "dim": 2, "scales": scales}
    return VAR(spec, dim=4, num_layers=1, num_heads=1)


@runner("var/gpt", "mask")
def mask(case: Case, step: Step) -> dict[str, Tensor]:
    model = _of_scales(case, step)
    return step.answers(model.attention_mask(Condition.none(1), 0, model.spec.length)[0, 0].to(torch.uint8))


@runner("var/gpt", "var_input")
@torch.no_grad()
def var_input(case: Case, step: Step) -> dict[str, Tensor]:
    quantizer = with_scales(
        _tokenizer(case).quantizer, as_grids(step.args.get("patch_nums", case.config["patch_nums"]))
    )
    return step.answers(ScaleExpander(quantizer).expand(step.tensor("ids", 0).long()))


@runner("var/gpt", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    ids, condition = _given(case, step)
    return step.answers(_model(case, step).logits(ids, condition, _tokenizer(case)))


def _output(case: Case, step: Step, row: int | None = None):
    ids, condition = _given(case, step, row)
    return _model(case, step)(ids, condition, tokenizer=_tokenizer(case))


@runner("var/gpt", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, (ids, _) = _model(case, step).train(), _given(case, step)
    output = _output(case, step)
    per_token = model.cross_entropy(output.prediction, ids)
    scales = torch.stack([part.mean() for part in per_token.split(model.scale_sizes, 1)])
    return step.answers(output.loss, output.metrics["last_loss"], scales)


@runner("var/gpt", "progressive_loss")
@torch.no_grad()
def progressive_loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, args = _model(case, step).train(), step.args
    ids, condition = _given(case, step)
    predicted = model.logits_of(_tokenizer(case).expander().expand(ids), condition, args["stage"] + 1)
    warmup = args.get("stage_warmup_iterations", 0)
    weights = model.token_weights(args["stage"], stage_warmth(args["stage_iteration"], warmup) if warmup else 1.0)
    return step.answers((model.cross_entropy(predicted, ids[:, : len(weights)]) @ weights).mean())


def _parameters(case: Case, step: Step) -> dict[str, Tensor]:
    """Our parameters by the reference's keys."""
    ours = dict(_model(case, step).named_parameters())
    keys = [key for key in case.shapes if not key.startswith(_prefix(case))]
    names = {key: list(our_names({key: torch.empty(0, device="meta")})) for key in keys}
    return {key: ours[name[0]] for key, name in names.items() if name and name[0] in ours}


@runner("var/gpt", "gradients")
def gradients(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, of="mean cross-entropy")
    parameters, wrt = _parameters(case, step), step.args["wrt"]
    _model(case, step).train()
    value = _output(case, step).loss
    found = torch.autograd.grad(value, [parameters[key] for key in wrt.values()], allow_unused=True)
    found = [torch.zeros_like(parameters[key]) if g is None else g for key, g in zip(wrt.values(), found)]
    return dict(zip(wrt, found))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _options(step: Step, **more) -> VAROptions:
    args = step.args
    refuse(step, guidance_schedule="linear_scales", draw="inverse_cdf")
    return VAROptions(
        temperature=0.0 if args.get("greedy", False) else args.get("temperature", 1.0),
        top_k=args.get("top_k") or 0,
        top_p=args.get("top_p") or 1.0,
        guidance_scale=1 + args["guidance_scale"],
        guidance_schedule="linear",
        **more,
    )


def _label_condition(case: Case, step: Step) -> Condition:
    return _condition(step, step.tensor("label", 0), None, case.config.get("num_classes", 1000))


def _run(session, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The ids that are drawn and the guided logits, step by step, and the final map."""
    ids, guided = [], []
    while session.step < len(session.plan):
        found = session.next_logits()
        here = slice(session.count, session.count + found.shape[1])
        drawn = draw_ids(found, None if uniforms is None else uniforms[:, here], session.options)
        session.commit([drawn])
        ids.append(drawn)
        guided.append(found)
    return torch.cat(ids, 1), torch.cat(guided, 1), session.tokens


@runner("var/gpt", "generate")
@torch.no_grad()
def generate(case: Case, step: Step) -> dict[str, Tensor]:
    model, tokenizer, options = _model(case, step), _tokenizer(case), _options(step)
    condition = _label_condition(case, step)
    uniforms = step.tensor("uniforms", 1) if options.temperature else None
    draws = None if uniforms is None else {"ids": uniforms}
    ids, guided, _ = _run(model.start(condition, options, draws=draws, tokenizer=tokenizer), uniforms)
    assert torch.equal(ids, model.sample(condition, options, draws=draws, tokenizer=tokenizer))
    return step.answers(ids, guided, tokenizer.quantizer.decode(ids))


@runner("var/gpt", "decode_f_hat")
@torch.no_grad()
def decode_f_hat(case: Case, step: Step) -> dict[str, Tensor]:
    pixels = _tokenizer(case).decode_map(step.tensor("f_hat", 0))
    if step.args.get("clamp", True):
        pixels = pixels.clamp(-1, 1)
    low, high = step.args.get("range", (0, 1))
    return step.answers((pixels + 1) * ((high - low) / 2) + low)


@runner("var/gpt", "generate_smooth")
@torch.no_grad()
def generate_smooth(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, logit_gain="1 + ratio", tau="max(0.27 * (1 - 0.95 * ratio), 0.005), ratio = k/(S-1)")
    model, tokenizer = _model(case, step), _tokenizer(case)
    noise = -step.tensor("exp_draws", 1).log()
    draws = {"ids": torch.full(noise.shape[:2], 0.5), GUMBEL: noise}
    options = _options(step, more_smooth=True)
    vectors = model.sample(_label_condition(case, step), options, draws=draws, tokenizer=tokenizer)
    return step.answers(tokenizer.quantizer.decode(vectors))


@runner("var/gpt", "edit_mask")
def edit_mask(case: Case, step: Step) -> dict[str, Tensor]:
    grid = as_grids(step.args.get("patch_nums", case.config["patch_nums"]))[-1]
    inside = box_mask(step.args["box"], grid)
    match step.args["mode"]:
        case "inpainting":
            keep = ~inside
        case "outpainting":
            keep = inside
        case mode:
            raise GoldenFailure(f"{step.id}: mode {mode!r} is not computed")
    return step.answers(keep.to(torch.uint8))


@runner("var/gpt", "generate_edit")
@torch.no_grad()
def generate_edit(case: Case, step: Step) -> dict[str, Tensor]:
    model, tokenizer, ids = _model(case, step), _tokenizer(case), step.tensor("ids", 1)
    options, condition = _options(step), _label_condition(case, step)
    if options.temperature:
        raise GoldenFailure(f"{step.id}: only greedy edits are computed")
    keep = step.tensor("edit_mask", 2).bool()
    keep = keep[None] if keep.ndim == 2 else keep
    regenerate = scale_masks(~keep.expand(len(ids), -1, -1), model.spec.scales)
    tokens = model.edit(ids, regenerate, condition, options, tokenizer=tokenizer)
    # What was predicted where the given ids were taken: the guided logits of the same sequence.
    session = model.start(condition, options, tokenizer=tokenizer)
    predicted = []
    for part in tokens.split(model.scale_sizes, 1):
        predicted.append(session.next_logits().argmax(-1))
        session.append(part)
    return step.answers(torch.cat(predicted, 1), tokenizer.quantizer.decode(tokens))


@runner("var/gpt", "filter_probs")
def filter_probs(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    kept = filter_logits(
        step.tensor("raw_logits", 0),
        temperature=args.get("temperature", 1.0),
        top_k=args.get("top_k") or 0,
        top_p=args.get("top_p") or 1.0,
    )
    return step.answers(kept.softmax(-1)[:, -1])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _scheduler(step: Step) -> SchedulerConfig:
    args, kind = step.args, step.args["kind"]
    options = {"warmup_steps": args["warmup_steps"], "final_factor": args["end_ratio"]}
    options["warmup_from"] = args.get("start_ratio", 0.005)
    holds = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0}
    if kind in holds:
        return SchedulerConfig("linear", hold=holds[kind], **options)
    if kind == "exp":
        return SchedulerConfig("exponential", hold=0.15, **options)
    if kind == "cos":
        return SchedulerConfig("cosine", **options)
    return SchedulerConfig("bent", bend=float(kind.removeprefix("lin")), **options)


def _optimizer_config(step: Step, **more) -> OptimizerConfig:
    args = step.args
    decay = {"weight_decay": args["wd"], "final_weight_decay": args.get("wd_end") if args["wd"] else None}
    return OptimizerConfig(lr=args["base_lr"] * args["batch_size"] / 256, **decay, **more)


@runner("var/gpt", "schedule")
def schedule(case: Case, step: Step) -> dict[str, Tensor]:
    config, total = _optimizer_config(step), step.args["total_steps"]
    rates, decays = lr_factor(_scheduler(step), total, config.lr), decay_factor(config, total)
    times = step.args.get("times", 1.0)
    lr = torch.tensor([rates(i) * config.lr * times for i in range(total)], dtype=torch.float64)
    return step.answers(lr, torch.tensor([decays(i) * config.weight_decay for i in range(total)], dtype=torch.float64))


@runner("var/gpt", "progressive_stage")
def progressive_stage(case: Case, step: Step) -> dict[str, Tensor]:
    args, model = step.args, _of_scales(case, step)
    model.progressive_share, model.progressive_from = args["fraction"], args["first_stage"]
    model.progressive_after = args["warmup_steps"]
    return step.answers(torch.tensor([model.stage_at(i, args["total_steps"]) for i in range(args["total_steps"])]))


def _undecayed(model: VAR) -> tuple[str, ...]:
    """The patterns of the published recipe that this model has names for; deeper ones add offsets."""
    patterns = (*yaml.safe_load(CONFIG.read_text())["optimizer"]["no_decay"], "*.offsets")
    names = [name for name, _ in model.named_parameters()]
    return tuple(pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names))


@runner("var/gpt", "param_groups")
def param_groups(case: Case, step: Step) -> dict[str, Tensor]:
    model, parameters = _model(case, step), _parameters(case, step)
    config = OptimizerConfig(weight_decay=1.0, no_decay=_undecayed(model))
    optimizer = build_optimizer(model.named_parameters(), config)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return step.answers(torch.tensor([int(id(parameters[key]) in decayed) for key in step.args["keys"]]))


@runner("var/gpt", "train_steps")
def train_steps(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, optimizer="adamw")
    args = step.args
    case._built.pop("var", None)  # trained weights are of no use to other steps
    model, parameters = _model(case, step).train(), _parameters(case, step)
    config = _optimizer_config(
        step, betas=tuple(args.get("betas", (0.9, 0.95))), eps=args.get("eps", 1e-8), no_decay=_undecayed(model)
    )
    optimizer = build_optimizer(model.named_parameters(), config)
    total = args["total_steps"]
    rates, decays = lr_factor(_scheduler(step), total, config.lr), decay_factor(config, total)
    losses, norms = [], []
    for i in range(args["n"]):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = (
                group["initial_lr"] * rates(i),
                group["initial_weight_decay"] * decays(i),
            )
        value = _output(case, step, i).loss
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args["grad_clip"] or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    case._built.pop("var")
    answers = {output: parameters[key] for output, key in args.get("params", {}).items()}
    first = [output for output in step.outputs if output not in answers]
    return dict(zip(first, (torch.stack(losses), torch.stack(norms)))) | answers
