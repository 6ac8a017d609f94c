"""Runners of MAR. Golden latents are maps (B, C, h, w); L and d count the model's tokens, patches of latents."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

import vistok
from vistok.flow.diffusion import GaussianDiffusion, even_timesteps, strided_timesteps
from vistok.generators.mar.model import MAR
from vistok.generators.mar.sampling import MAROptions, masks_left
from vistok.types import Condition

from ..harness import Case, GoldenFailure, Step, runner

TABLES = (
    "timesteps",
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


def _model(case: Case, step: Step) -> MAR:
    model = case.once("model", lambda: vistok.from_official(case.model, {**case.config, **case.build}, case.state))
    return model.train(step.args.get("train", False))


def _condition(step: Step, rows: int) -> Condition:
    if step.args.get("unconditional", False):
        return Condition.none(rows)
    condition = Condition.from_labels(step.case.tensor("label"))
    return condition.drop(step.case.tensor("drop").bool()) if step.has("drop") else condition


def _tokens(latent: Tensor) -> Tensor:
    return rearrange(latent, "b d h w -> b (h w) d")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _visible(model: MAR, step: Step) -> Tensor:
    return _split(model, step.case)[1]


def _split(model: MAR, case: Case) -> tuple[Tensor, Tensor]:
    """The positions that are masked, and those that are visible."""
    count, orders = model.num_masked(float(case.tensor("mask_rate"))), case.tensor("orders")
    return orders[:, :count], orders[:, count:].sort(1).values


def _encoded(model: MAR, step: Step) -> Tensor:
    tokens = model.group(_tokens(step.case.tensor("latent")))
    classes = model.embed_classes(_condition(step, len(tokens)))
    return model.encode(tokens, _visible(model, step), classes)


def _copies(step: Step) -> int:
    return step.args.get("diffusion_batch_mul", step.case.config.get("diffusion_batch_mul", 1))


def _rows(model: MAR, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """The head's output, the tokens, and the condition, for all rows (m B L), the repetition outermost."""
    copies = _copies(step)
    z = model.decode(_encoded(model, step), _visible(model, step)).repeat(copies, 1, 1).flatten(0, 1)
    data = model.group(_tokens(step.case.tensor("latent"))).repeat(copies, 1, 1).flatten(0, 1)
    t, noise = step.case.tensor("t"), step.case.tensor("noise")
    return model.head(model.diffusion.add_noise(data, noise, t), t, model.head.condition(z)), data, z


@runner("mar/generator", "mask")
@torch.no_grad()
def mask(case: Case, step: Step) -> dict[str, Tensor]:
    orders, model = step.tensor("orders", 0), _model(case, step)
    hidden = torch.ones_like(orders).scatter(1, _visible(model, step), 0)
    return step.answers(hidden.to(step.expected(step.outputs[0]).dtype))


@runner("mar/generator", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_encoded(_model(case, step), step))


@runner("mar/generator", "condition")
@torch.no_grad()
def condition(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step)
    return step.answers(model.decode(_encoded(model, step), _visible(model, step)))


@runner("mar/generator", "head")
@torch.no_grad()
def head(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_rows(_model(case, step), step)[0])


def _loss_terms(case: Case, step: Step) -> tuple[Tensor, Tensor]:
    model = _model(case, step)
    output, data, _ = _rows(model, step)
    return model.diffusion.loss_terms(output, data, case.tensor("noise"), case.tensor("t"))


@runner("mar/generator", "row_mse")
@torch.no_grad()
def row_mse(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_loss_terms(case, step)[0])


@runner("mar/generator", "row_vb")
@torch.no_grad()
def row_vb(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_loss_terms(case, step)[1])


@runner("mar/generator", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, tokens, copies = _model(case, step), _tokens(case.tensor("latent")), _copies(step)
    masked, visible = _split(model, case)
    draws = {
        "masked": masked,
        "visible": visible,
        "time": rearrange(case.tensor("t"), "(m b l) -> b m l", m=copies, b=len(tokens)),
        "noise": rearrange(case.tensor("noise"), "(m b l) d -> b m l d", m=copies, b=len(tokens)),
    }
    return step.answers(model(tokens, _condition(step, len(tokens)), draws=draws).loss)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@runner("mar/generator", "fill_order")
def fill_order(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("schedule", "cosine") != "cosine":
        raise GoldenFailure(f"{step.id}: schedule {step.args['schedule']!r} is not computed, only 'cosine'")
    orders = step.tensor("orders", 0)
    filled, before = torch.zeros_like(orders), orders.shape[1]
    for iteration, left in enumerate(masks_left(orders.shape[1], step.args["num_iter"])):
        filled.scatter_(1, orders[:, left:before], iteration)
        before = left
    return step.answers(filled)


@runner("mar/generator", "sample_condition")
@torch.no_grad()
def sample_condition(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("iteration", 0) != 0:
        raise GoldenFailure(f"{step.id}: only iteration 0 is computed, where nothing is visible")
    model, orders = _model(case, step), step.tensor("orders", 0)
    given = _condition(step, len(orders))
    halves = {"conditional": given, "null": given.null()}
    nothing, empty = orders[:, :0], torch.zeros(len(orders), model.length, model.token_dim)
    rows = [
        model.decode(model.encode(empty, nothing, model.embed_classes(halves[name])), nothing)
        for name in step.args.get("rows", ("conditional",))
    ]
    return step.answers(torch.cat(rows))


def _spacing(respacing: str) -> tuple[str, int]:
    stride = respacing.startswith("ddim")
    return ("stride" if stride else "even"), int(respacing.removeprefix("ddim"))


@runner("mar/generator", "schedule")
def schedule(case: Case, step: Step) -> dict[str, Tensor]:
    if step.args.get("noise_schedule", "cosine") != "cosine":
        raise GoldenFailure(f"{step.id}: noise_schedule {step.args['noise_schedule']!r} is not computed")
    total = step.args["num_timesteps"]
    spacing, count = _spacing(step.args["respacing"] or str(total))
    timesteps = (even_timesteps if spacing == "even" else strided_timesteps)(total, count)
    diffusion = GaussianDiffusion.cosine(total).respaced(timesteps)
    tables = {name: torch.as_tensor(getattr(diffusion, name)) for name in TABLES}
    answers = {}
    for output in step.outputs:
        # Outputs are named PREFIX_table; one table's name may end with another's.
        names = [name for name in TABLES if output == name or output.endswith(f"_{name}")]
        if not names:
            raise GoldenFailure(f"{step.id}: there is no table {output!r}")
        answers[output] = tables[max(names, key=len)]
    return answers


@runner("mar/generator", "sample")
def sample(case: Case, step: Step) -> dict[str, Tensor]:
    model, args, orders = _model(case, step), step.args, step.tensor("orders", 0)
    spacing, count = _spacing(args.get("respacing") or case.config["num_sampling_steps"])
    options = MAROptions(
        num_iter=args["num_iter"],
        num_steps=count,
        step_spacing=spacing,
        guidance_scale=args.get("guidance_scale", 1.0),
        guidance_schedule=args.get("guidance_schedule", "linear"),
        temperature=args.get("temperature", 1.0),
    )
    draws = {"order": orders, "noise": rearrange(step.tensor("noise", 1), "s b l d -> b s l d")}
    tokens = model.sample(_condition(step, len(orders)), options, draws=draws)
    return step.answers(rearrange(tokens, "b (h w) d -> b d h w", h=model.spec.grid[0]))
