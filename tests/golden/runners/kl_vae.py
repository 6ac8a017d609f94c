"""Runners of the KL autoencoder. Golden pixels are in [-1, 1]; latents are maps (B, z, h, w)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

import vistok
from vistok.quantizers.gaussian import gaussian_kl
from vistok.tokenizers.kl_vae import KLVAE

from ..harness import Case, GoldenFailure, Step, runner


def _model(case: Case, latent_scale: float = 1.0) -> KLVAE:
    config = {**case.config, **case.build, "scale_factor": latent_scale}
    build = lambda: vistok.from_official(case.model, config, case.state)  # noqa: E731
    return case.once(f"model {latent_scale}", build).eval()


def _grid(model: KLVAE, image: Tensor) -> tuple[int, int]:
    return model.spec_for(image.shape[1:]).grid


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])


def _encode(model: KLVAE, step: Step) -> Tensor:
    """Standardised latents (B, L, z) of the step's image."""
    posterior = step.args.get("posterior", "mean")
    if posterior not in ("mean", "sample"):
        raise GoldenFailure(f"{step.id}: posterior {posterior!r} is not computed, only 'mean' and 'sample'")
    noise = rearrange(step.tensor("noise", 1), "b d h w -> b (h w) d") if posterior == "sample" else None
    return model.encode(step.tensor("image", 0), draws=None if noise is None else {"posterior": noise})


@runner("kl_vae/tokenizer", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_model(case).vae.encoder(step.tensor("image", 0)))


@runner("kl_vae/tokenizer", "moments")
@torch.no_grad()
def moments(case: Case, step: Step) -> dict[str, Tensor]:
    vae = _model(case).vae
    return step.answers(vae.quant_conv(vae.encoder(step.tensor("image", 0))))


@runner("kl_vae/tokenizer", "kl")
@torch.no_grad()
def kl(case: Case, step: Step) -> dict[str, Tensor]:
    low, high = step.args.get("logvar_clamp", (-30.0, 20.0))
    mean, log_variance = _model(case).moments(step.tensor("image", 0))
    return step.answers(gaussian_kl(mean, log_variance.clamp(low, high)).flatten(1).sum(1))


@runner("kl_vae/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step.args.get("latent_scale", 1.0))
    return step.answers(_as_map(_encode(model, step), _grid(model, step.tensor("image", 0))))


@runner("kl_vae/tokenizer", "reconstruct")
@torch.no_grad()
def reconstruct(case: Case, step: Step) -> dict[str, Tensor]:
    model = _model(case, step.args.get("latent_scale", 1.0))
    pixels = model.decode(_encode(model, step), grid=_grid(model, step.tensor("image", 0)))
    return step.answers(pixels.clamp(-1, 1) if step.args.get("clamp", False) else pixels)
