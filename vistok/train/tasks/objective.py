"""The objective of a tokenizer: named terms, weighted by the config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistok.draws import Draws, Keys
from vistok.losses import EncoderConfig
from vistok.signatures import ConfigError, build, check
from vistok.tokenizers.base import Tokenizer
from vistok.train.tasks.teachers import (
    AlignmentTerm,
    ClassifierTerm,
    CodePredictionTerm,
    SemanticConfig,
    SemanticContrastTerm,
    SemanticTerm,
)
from vistok.train.tasks.terms import (
    ARPriorTerm,
    DistanceTerm,
    OwnTerm,
    PerceptualTerm,
    PixelTerm,
    ReconstructionConfig,
    Term,
    TermConfig,
)
from vistok.train.tasks.text_contrast import TextContrastTerm
from vistok.types import MAIN, Clock, TokenizerOutput
from vistok.utils.spelling import suggestion

SETTING_TYPES = {
    "reconstructions": dict[str, dict[str, Any]],
    "lpips_weights": str | None,
    "lpips_weighting": str,
    "repa_encoder": EncoderConfig,
}
"""Types of the keys in the losses section that are neither terms nor ``gan``."""
SETTINGS = ("gan", *SETTING_TYPES)


TERMS: dict[str, type[Term]] = {
    "l1": DistanceTerm,
    "l2": DistanceTerm,
    "lpips": PerceptualTerm,
    "repa": AlignmentTerm,
    "ar_prior": ARPriorTerm,
    "semantic": SemanticTerm,
    "low_level": SemanticTerm,  # a second term, for another feature and encoder
    "classifier": ClassifierTerm,
    "code_prediction": CodePredictionTerm,
    "semantic_contrast": SemanticContrastTerm,
    "text_contrast": TextContrastTerm,
}
"""Terms for every tokenizer with the features that they read; all other terms are the tokenizer's own."""
OLD_SETTINGS = {"lpips": ("lpips_weights", "lpips_weighting"), "repa": ("repa_encoder",)}
"""Older keys of the losses section, by term: ``lpips_weights`` means ``lpips.weights``."""


class TokenizerObjective(nn.Module):
    """The weighted sum of pixel, perceptual, feature and code terms of a tokenizer (the adversary is separate).

    Args:
        losses: by the name of a term, its weight or its section (``TermConfig``). Terms are the keys of ``TERMS`` that
            fit the tokenizer, and its own terms (codebook, commitment, entropy, logit_laplace, flow, …).
            ``reconstructions`` has a ``ReconstructionConfig`` by name; ``gan`` is read elsewhere.

    Raises:
        ConfigError: a term that this tokenizer does not provide, or no term at all.
        CheckpointError: the weights of a frozen network cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, losses: Mapping[str, Any]):
        super().__init__()
        configs = check_terms(tokenizer, losses)
        order = [*(name for name in configs if name not in TERMS), *(name for name in TERMS if name in configs)]
        self.terms: Any = nn.ModuleDict({name: _term(name, configs[name], tokenizer) for name in order})
        self.reconstructions = _reconstructions(losses)

    def _active(self, step: int) -> Iterator[Any]:
        return (term for term in self.terms.values() if term.config.active(step))

    @property
    def changes(self) -> set[int]:
        """The steps after which another set of terms is active."""
        configs = [*(term.config for term in self.terms.values()), *self.reconstructions.values()]
        return {step for config in configs for step in config.changes}

    @property
    def changing_parameters(self) -> bool:
        """Whether a term with parameters begins late or ends early."""
        return any(bool(term.config.changes and list(term.parameters())) for term in self.terms.values())

    @property
    def complete_from(self) -> int:
        """The first step at which every term has begun."""
        return max(term.config.start_step for term in self.terms.values())

    def reads_codes(self, step: int) -> bool:
        """Whether a term reads the feature "codes" in this step."""
        return any(term.reads_codes for term in self._active(step))

    def reads_labels(self, step: int) -> bool:
        """Whether a term reads the feature "labels", the classes of the batch, in this step."""
        return any(term.reads_labels for term in self._active(step))

    def prepare(self, classes: Sequence[str]) -> None:
        """Prepare the terms before training, with the names of the classes.

        Raises:
            ConfigError: a term needs classes, and there are none.
        """
        for term in self.terms.values():
            term.prepare(classes)

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that the terms use, by name."""
        return {name: network for term in self.terms.values() for name, network in term.frozen().items()}

    def training_draws(self, keys: Keys) -> Draws:
        """The random tensors that the active terms consume, by name."""
        return {name: draw for term in self._active(keys.step) for name, draw in term.training_draws(keys).items()}

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> dict[str, Tensor]:
        """The scalar terms by name, unweighted but with their boost, for target pixels in [-1, 1].

        The terms of a reconstruction other than the main one are named "term/reconstruction".

        Args:
            tokenizer: the one that made ``output``.
        """
        terms = {}
        for term in self._active(clock.step):
            factor = term.config.factor(clock.step)
            terms[term.name] = term(output, target, clock, draws, tokenizer) * factor
            for name in output.reconstructions if isinstance(term, PixelTerm) else ():
                other = self._reconstruction(name)
                if name != MAIN and other.active(clock.step):
                    compared = term.compare(name, output, target)
                    terms[f"{term.name}/{name}"] = compared * factor * other.factor(clock.step)
        return terms

    def _reconstruction(self, name: str) -> ReconstructionConfig:
        return self.reconstructions.get(name, ReconstructionConfig())

    def weight(self, name: str) -> float:
        """The weight of a term, by its name in ``forward``."""
        term, _, reconstruction = name.partition("/")
        weight: float = self.terms[term].config.weight
        return weight * self._reconstruction(reconstruction).weight if reconstruction else weight

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms."""
        if not terms:
            raise ConfigError("losses: no term counts at this step; check start_step and until_step")
        return torch.stack([self.weight(name) * value for name, value in terms.items()]).sum()

    def reconstruction_total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the pixel and perceptual terms, which the adaptive GAN weight balances.

        Raises:
            ConfigError: there are none.
        """
        chosen = {n: v for n, v in terms.items() if self.terms[n.partition("/")[0]].compares_pixels}
        if not chosen:
            raise ConfigError("losses.gan.balance=adaptive needs a pixel or perceptual term (l1, l2, lpips)")
        return self.total(chosen)


def check_terms(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> dict[str, TermConfig]:
    """The configs of the terms with a weight other than 0, after checking that this tokenizer provides each.

    Raises:
        ConfigError: see ``TokenizerObjective``; the message names the allowed terms and the nearest match.
    """
    allowed = (*(name for name, kind in TERMS.items() if kind.fits(tokenizer)), *tokenizer.loss_terms)
    configs = {}
    for name, value in losses.items():
        if name in SETTINGS:
            continue
        if name not in allowed:
            needs = f": {TERMS[name].needs}." if name in TERMS and TERMS[name].needs else None
            hint = needs or suggestion(name, allowed) or "."
            raise ConfigError(
                f"losses.{name}: {type(tokenizer).__name__} provides no such term{hint} "
                f"It provides: {', '.join(allowed)}."
            )
        configs[name] = _config(name, value, losses)
    _check_times(tokenizer, losses, configs)
    _check_feature(tokenizer, configs)
    configs = {name: config for name, config in configs.items() if config.weight}
    if not configs:
        raise ConfigError(
            f"losses is empty; give at least one weight, for example losses.l2=1.0 (of {', '.join(allowed)})"
        )
    return configs


def _config(name: str, value: Any, losses: Mapping[str, Any]) -> TermConfig:
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
        raise ConfigError(f"losses.{name}: expected a weight (a number) or a section with one, got {value!r}")
    section = dict(value) if isinstance(value, Mapping) else {"weight": value}
    for key in OLD_SETTINGS.get(name, ()):
        if key in losses:
            section.setdefault(key.removeprefix(f"{name}_"), losses[key])
    return build(TERMS.get(name, Term).config_type, section, f"losses.{name}")


def _check_times(tokenizer: Tokenizer, losses: Mapping[str, Any], configs: Mapping[str, TermConfig]) -> None:
    """Refuse the weighting ``time`` for tokenizers without times, also if LPIPS is off."""
    config: Any = configs.get("lpips") or _config("lpips", 0.0, losses)
    if config.weighting == "time" and "flow" not in tokenizer.loss_terms:
        raise ConfigError(f"losses.lpips.weighting: {type(tokenizer).__name__} trains at no time; leave it out")


def _check_feature(tokenizer: Tokenizer, configs: Mapping[str, TermConfig]) -> None:
    for name, config in configs.items():
        if not isinstance(config, SemanticConfig) or config.feature in tokenizer.raster_features:
            continue
        raise ConfigError(
            f"losses.{name}.feature: {type(tokenizer).__name__} names no raster of features {config.feature!r}; it "
            f"names: {', '.join(tokenizer.raster_features)}"
        )


def _term(name: str, config: TermConfig, tokenizer: Tokenizer) -> Term:
    if name not in TERMS:
        return OwnTerm(name, config)
    make: Callable[[str, Any, Tokenizer], Term] = TERMS[name]
    return make(name, config, tokenizer)


def _reconstructions(losses: Mapping[str, Any]) -> dict[str, ReconstructionConfig]:
    sections = check(_reconstruction_sections, {"reconstructions": losses.get("reconstructions", {})}, "losses")
    return {
        name: build(ReconstructionConfig, section, f"losses.reconstructions.{name}")
        for name, section in sections["reconstructions"].items()
    }


def _reconstruction_sections(reconstructions: dict[str, dict[str, Any]]) -> None:
    """Has the parameter that the ``reconstructions`` section is checked against."""
