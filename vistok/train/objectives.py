"""What each stage minimises: named terms, weighted by the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vistok.config import ConfigError, check, nearest
from vistok.losses import L1, L2, LPIPS, Alignment, EncoderConfig
from vistok.tokenizers.base import Tokenizer
from vistok.train.config import GanConfig
from vistok.types import TokenizerOutput

PIXEL_TERMS = ("l1", "l2", "lpips")
SETTINGS = ("gan", "lpips_weights", "lpips_weighting", "repa_encoder")
LPIPS_WEIGHTINGS = ("uniform", "time")


class TokenizerObjective(nn.Module):
    """The weighted sum of pixel, perceptual and code terms of a tokenizer (the adversary is separate).

    Pixel terms compare images in the tokenizer's native range, so that their weights mean what they mean in its paper;
    LPIPS always reads [-1, 1].

    Args:
        losses: weights by name. Any of l1, l2, lpips, and what the tokenizer provides (codebook, commitment, entropy,
            logit_laplace, flow, ...), and repa where it has a head for it. ``lpips_weights`` is the weights file;
            ``lpips_weighting`` "time" counts an image 2t times, t being its time in a flow tokenizer's training;
            ``repa_encoder`` is the frozen encoder (``EncoderConfig``); ``gan`` is read elsewhere.

    Raises:
        ConfigError: a term that this tokenizer does not provide, or no term at all.
        CheckpointError: weights of a frozen network that cannot be had.
    """

    def __init__(self, tokenizer: Tokenizer, losses: Mapping[str, Any]):
        super().__init__()
        self.weights = check_terms(tokenizer, losses)
        self.pixel_terms = nn.ModuleDict({"l1": L1(), "l2": L2()})
        self.lpips = LPIPS.from_pretrained(losses.get("lpips_weights")) if self.weights.get("lpips") else None
        self.lpips_weighting = _weighting(tokenizer, losses)
        self.alignment = _alignment(tokenizer, losses) if self.weights.get("repa") else None
        self.to_native = tokenizer.to_native

    def forward(self, output: TokenizerOutput, target: Tensor) -> dict[str, Tensor]:
        """The unweighted scalar terms for target pixels in [-1, 1], by name."""
        terms = {name: output.losses[name].mean() for name in self.weights if name in output.losses}
        for name, loss in self.pixel_terms.items():
            if name in self.weights:
                terms[name] = loss(self.to_native(output.reconstruction), self.to_native(target))
        if self.lpips is not None:
            distances = self.lpips(output.reconstruction, target)
            factor = 2 * output.features["time"] if self.lpips_weighting == "time" else 1
            terms["lpips"] = (distances * factor).mean()
        if self.alignment is not None:
            terms["repa"] = self.alignment(output.features["alignment"], target).mean()
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()

    def reconstruction_total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted pixel and perceptual terms: what the adaptive GAN weight is balanced against."""
        chosen = [self.weights[n] * v for n, v in terms.items() if n in (*PIXEL_TERMS, "logit_laplace")]
        if not chosen:
            raise ConfigError("losses.gan.balance=adaptive needs a pixel or perceptual term (l1, l2, lpips)")
        return torch.stack(chosen).sum()


def check_terms(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> dict[str, float]:
    """The weights of the terms that are on, after checking that this tokenizer provides each.

    Raises:
        ConfigError: as above, naming the allowed terms and the nearest match.
    """
    allowed = (*PIXEL_TERMS, *tokenizer.loss_terms) if tokenizer.reconstructs else tokenizer.loss_terms
    allowed = allowed if tokenizer.alignment_dim is None else (*allowed, "repa")
    weights = {}
    for name, weight in losses.items():
        if name in SETTINGS:
            continue
        if name not in allowed:
            near = nearest(name, allowed)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(
                f"losses.{name}: {type(tokenizer).__name__} provides no such term{hint} "
                f"It provides: {', '.join(allowed)}."
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"losses.{name}: expected a weight (a number), got {weight!r}")
        if weight:
            weights[name] = float(weight)
    if not weights:
        raise ConfigError(
            f"losses is empty; give at least one weight, for example losses.l2=1.0 (of {', '.join(allowed)})"
        )
    return weights


def _weighting(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> str:
    weighting = losses.get("lpips_weighting", "uniform")
    if weighting not in LPIPS_WEIGHTINGS:
        raise ConfigError(f"losses.lpips_weighting: expected one of {', '.join(LPIPS_WEIGHTINGS)}, got {weighting!r}")
    if weighting == "time" and "flow" not in tokenizer.loss_terms:
        raise ConfigError(f"losses.lpips_weighting: {type(tokenizer).__name__} trains at no time; leave it out")
    return weighting


def _alignment(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> Alignment:
    config = EncoderConfig(**check(EncoderConfig, losses.get("repa_encoder", {}), "losses.repa_encoder"))
    alignment = Alignment(config)
    if alignment.encoder.dim != tokenizer.alignment_dim:
        raise ConfigError(
            f"model.alignment.dim is {tokenizer.alignment_dim}, but {config.name} has {alignment.encoder.dim} channels"
        )
    return alignment


def gan_config(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> GanConfig | None:
    """The ``gan`` section of ``losses``, or None."""
    section = losses.get("gan")
    if section is None:
        return None
    if not tokenizer.reconstructs:
        raise ConfigError(
            f"losses.gan: {type(tokenizer).__name__} is not trained through its pixels, a GAN has no input"
        )
    return GanConfig(**check(GanConfig, section, "losses.gan"))
