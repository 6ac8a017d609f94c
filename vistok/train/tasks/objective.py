"""What a tokenizer's learner minimises: named terms, weighted by the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.config import ConfigError, build, check, check_least, nearest
from vistok.draws import Draws, Keys
from vistok.losses import L1, L2, LPIPS, ARPrior, EncoderConfig, FrozenEncoder, alignment_distance
from vistok.nn.alignment import AlignmentHead
from vistok.tokenizers.base import Tokenizer
from vistok.types import MAIN, Clock, TokenizerOutput

ENCODER = EncoderConfig()
SETTINGS = ("gan", "reconstructions", "lpips_weights", "lpips_weighting", "repa_encoder")


@dataclass(frozen=True)
class TermConfig:
    """One term of the objective; in place of the section a number is its weight.

    Attributes:
        start_step, until_step: it counts from the first on, and no longer from the second on.
        boost, boost_steps: at step 0 it counts 1 + boost times as much, and until ``boost_steps`` that falls evenly to
            once (Open-MAGVIT2 asks so for even use of its codes). The term is logged as it counts.
    """

    weight: float
    start_step: int = 0
    until_step: int | None = None
    boost: float = 0.0
    boost_steps: int = 2000

    def __post_init__(self) -> None:
        check_least(self, start_step=0, boost=0, boost_steps=1)

    def factor(self, step: int) -> float:
        """How many times as much it counts at a step."""
        return 1 + self.boost * max(0.0, 1 - step / self.boost_steps)

    def active(self, step: int) -> bool:
        return self.start_step <= step and (self.until_step is None or step < self.until_step)

    @property
    def changes(self) -> tuple[int, ...]:
        """The steps after which it begins or ends."""
        return tuple(step for step in (self.start_step, self.until_step) if step)


@dataclass(frozen=True)
class ReconstructionConfig(TermConfig):
    """How much a reconstruction besides the main one counts, of the weights of all terms that compare pixels."""

    weight: float = 1.0


class Frozen:
    """Holds a network that is never trained: no part of the module that asks it, and shared by that module's copies."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> Frozen:
        return self


class Term(nn.Module):
    """A named term. Its parameters, if it has any, are trained with the tokenizer, and end with the run."""

    config_type: ClassVar[type[TermConfig]] = TermConfig
    compares_pixels: ClassVar[bool] = False
    """Whether the adaptive weight of a GAN is balanced against it."""
    reads_codes: ClassVar[bool] = False
    """Whether it reads the feature "codes", the tokenizer's whole codebook."""

    def __init__(self, name: str, config: TermConfig):
        super().__init__()
        self.name, self.config = name, config

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer gives what the term reads."""
        return True

    def frozen(self) -> dict[str, nn.Module]:
        """Networks that it asks, by name."""
        return {}

    def training_draws(self, keys: Keys) -> Draws:
        """What ``forward`` draws from, under names of its own."""
        return {}

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        """The unweighted scalar, for target pixels in [-1, 1]."""
        raise NotImplementedError


class OwnTerm(Term):
    """What the tokenizer computes itself: of ``output.losses`` the mean of the one of that name."""

    def __init__(self, name: str, config: TermConfig):
        super().__init__(name, config)
        self.compares_pixels = name == "logit_laplace"

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        return output.losses[self.name].mean()


class PixelTerm(Term):
    """A term that compares a reconstruction with its target, and applies to each of them."""

    compares_pixels = True

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return tokenizer.reconstructs

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        return self.compare(MAIN, output, target)

    def compare(self, reconstruction: str, output: TokenizerOutput, target: Tensor) -> Tensor:
        """The scalar for one of the output's reconstructions."""
        raise NotImplementedError


class DistanceTerm(PixelTerm):
    """A distance of pixels in the tokenizer's native range, so that weights mean what they mean in its paper."""

    distances: ClassVar[Mapping[str, type[nn.Module]]] = {"l1": L1, "l2": L2}

    def __init__(self, name: str, config: TermConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        self.distance, self.to_native = self.distances[name](), tokenizer.to_native

    def compare(self, reconstruction: str, output: TokenizerOutput, target: Tensor) -> Tensor:
        pixels = self.to_native(output.reconstructions[reconstruction])
        return self.distance(pixels, self.to_native(target), output.weight_maps.get(reconstruction))


@dataclass(frozen=True)
class PerceptualConfig(TermConfig):
    """LPIPS.

    Attributes:
        weights: its weights file; None downloads the published one.
        weighting: ``time`` counts an image 2t times, t being its time in a flow tokenizer's training.
        pixels: LPIPS is made for pixels in [-1, 1] (``public``); ``native`` hands it those of the tokenizer's range, as
            recipes in [0, 1] do.
    """

    weights: str | None = None
    weighting: Literal["uniform", "time"] = "uniform"
    pixels: Literal["public", "native"] = "public"


class PerceptualTerm(PixelTerm):
    """LPIPS, of pixels in [-1, 1]. Weight maps do not apply to it."""

    config_type = PerceptualConfig
    config: PerceptualConfig

    def __init__(self, name: str, config: PerceptualConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        self.lpips = Frozen(LPIPS.from_pretrained(config.weights))
        self.as_seen = tokenizer.to_native if config.pixels == "native" else nn.Identity()

    def frozen(self) -> dict[str, nn.Module]:
        return {"lpips": self.lpips.network}

    def compare(self, reconstruction: str, output: TokenizerOutput, target: Tensor) -> Tensor:
        pixels = output.reconstructions[reconstruction]
        if pixels.ndim == 5:  # of clips the frames are compared
            pixels, target = (rearrange(clips, "b c t h w -> (b t) c h w") for clips in (pixels, target))
        distances = self.lpips.network(self.as_seen(pixels), self.as_seen(target))
        factor = 2 * output.features["time"] if self.config.weighting == "time" else 1
        return (distances * factor).mean()


@dataclass(frozen=True)
class AlignmentTermConfig(TermConfig):
    """Alignment with a frozen encoder (REPA, arXiv 2410.06940).

    Attributes:
        encoder: the frozen encoder.
    """

    encoder: EncoderConfig = ENCODER


class AlignmentTerm(Term):
    """1 - cosine of the tokenizer's feature "alignment" and the frozen encoder's patch features."""

    config_type = AlignmentTermConfig
    config: AlignmentTermConfig

    def __init__(self, name: str, config: AlignmentTermConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        encoder = FrozenEncoder(config.encoder)
        if encoder.dim != tokenizer.alignment_dim:
            raise ConfigError(
                f"model.alignment.dim is {tokenizer.alignment_dim}, but {config.encoder.name} has {encoder.dim} "
                "channels"
            )
        self.encoder = Frozen(encoder)

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return tokenizer.alignment_dim is not None

    def frozen(self) -> dict[str, nn.Module]:
        return {"repa_encoder": self.encoder.network}

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        weights = output.weight_maps.get("alignment")
        return alignment_distance(output.features["alignment"], self.encoder.network(target), weights).mean()


@dataclass(frozen=True)
class ARPriorConfig(TermConfig):
    """The prior and its rounds of scheduled sampling; see ``ARPrior``.

    Attributes:
        num_layers, num_heads, dim: of the GPT.
        drop: its dropout.
        normalize: l2-normalise its predictions, for codes that are normalised.
        temperature: of its logits.
        num_rounds: passes per step.
        mix_ratio: share of positions that later rounds see replaced, at the most.
        mix_until: the share grows until this share of the run is over.
        average_rounds: the loss is the mean over all rounds, else that of the last.
        detach_early_rounds: rounds before the last do not reach the tokenizer.
    """

    num_layers: int = 12
    num_heads: int = 6
    dim: int = 384
    drop: float = 0.1
    normalize: bool = True
    temperature: float = 1.0
    num_rounds: int = 2
    mix_ratio: float = 0.5
    mix_until: float = 0.3
    average_rounds: bool = True
    detach_early_rounds: bool = False


class ARPriorTerm(Term):
    """A small autoregressive model of the tokens, trained beside the tokenizer, which learns tokens that are easy to
    predict in their order. Cross entropy in nats per token."""

    config_type = ARPriorConfig
    config: ARPriorConfig
    reads_codes = True

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        spec = tokenizer.spec
        return spec.discrete and spec.depth == 1 and not spec.scales  # whose places are sums of several codes

    def __init__(self, name: str, config: ARPriorConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        spec, outer = tokenizer.spec, {field.name for field in fields(TermConfig)}
        options = {key: value for key, value in asdict(config).items() if key not in outer}
        try:
            self.prior = ARPrior(spec.dim, spec.length, **options)
        except ValueError as error:
            raise ConfigError(f"losses.{name}: {error}") from error
        self.length = spec.length

    def training_draws(self, keys: Keys) -> Draws:
        return self.prior.training_draws(keys, self.length)

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        quantized, codes = (output.features[name] for name in ("quantized", "codes"))
        return self.prior(quantized, output.tokens, codes, progress=clock.progress, draws=draws).loss


@dataclass(frozen=True)
class SemanticConfig(TermConfig):
    """Semantic regularisation (GigaTok, arXiv 2504.08736): features are to tell those of a frozen encoder.

    Attributes:
        feature: which; the tokenizer names them.
        encoder: the frozen encoder; "efficientnet_lite0" needs no download.
        hidden_ratio: width of the head between both, in units of the feature's.
    """

    feature: str = "decoded"
    encoder: EncoderConfig = ENCODER
    hidden_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_ratio <= 0:
            raise ValueError(f"hidden_ratio must be positive, got {self.hidden_ratio}")


class SemanticTerm(Term):
    """1 - cosine of a feature of the tokenizer, behind a head that is trained with it, and the frozen encoder's patch
    features. Rasters of other sizes are resized."""

    config_type = SemanticConfig
    config: SemanticConfig

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return bool(tokenizer.raster_features)

    def __init__(self, name: str, config: SemanticConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        dim = tokenizer.raster_features[config.feature]
        encoder = FrozenEncoder(config.encoder)
        self.head = AlignmentHead(dim, round(config.hidden_ratio * dim), encoder.dim)
        self.encoder = Frozen(encoder)

    def frozen(self) -> dict[str, nn.Module]:
        return {f"{self.name}_encoder": self.encoder.network}

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        feature = self.config.feature
        aligned, weights = self.head(output.features[feature]), output.weight_maps.get(feature)
        return alignment_distance(aligned, self.encoder.network(target), weights).mean()


TERMS: dict[str, type[Term]] = {
    "l1": DistanceTerm,
    "l2": DistanceTerm,
    "lpips": PerceptualTerm,
    "repa": AlignmentTerm,
    "ar_prior": ARPriorTerm,
    "semantic": SemanticTerm,
    "low_level": SemanticTerm,  # a second one, for another feature and another encoder
}
"""Terms that any tokenizer can have which gives what they read; others are the tokenizer's own."""
OLD_SETTINGS = {"lpips": ("lpips_weights", "lpips_weighting"), "repa": ("repa_encoder",)}
"""Keys of the losses section that belong to a term: ``lpips_weights`` is ``lpips.weights``."""


class TokenizerObjective(nn.Module):
    """The weighted sum of pixel, perceptual, feature and code terms of a tokenizer (the adversary is separate).

    Args:
        losses: by name a weight, or a section (``TermConfig``). Any of l1, l2, lpips, what the tokenizer provides
            (codebook, commitment, entropy, logit_laplace, flow, ...), repa where it has a head for it, and semantic
            where it names features of a raster.
            ``reconstructions`` has a ``ReconstructionConfig`` by name; ``gan`` is read elsewhere.

    Raises:
        ConfigError: a term that this tokenizer does not provide, or no term at all.
        CheckpointError: weights of a frozen network that cannot be had.
    """

    def __init__(self, tokenizer: Tokenizer, losses: Mapping[str, Any]):
        super().__init__()
        configs = check_terms(tokenizer, losses)
        order = [*(name for name in configs if name not in TERMS), *(name for name in TERMS if name in configs)]
        self.terms = nn.ModuleDict({name: _term(name, configs[name], tokenizer) for name in order})
        self.reconstructions = _reconstructions(losses)

    def _active(self, step: int) -> Iterator[Term]:
        return (term for term in self.terms.values() if term.config.active(step))

    @property
    def changes(self) -> set[int]:
        """The steps after which another set of terms counts."""
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

    def frozen(self) -> dict[str, nn.Module]:
        """Networks that the terms ask, by name."""
        return {name: network for term in self.terms.values() for name, network in term.frozen().items()}

    def training_draws(self, keys: Keys) -> Draws:
        """What the terms draw from."""
        return {name: draw for term in self._active(keys.step) for name, draw in term.training_draws(keys).items()}

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> dict[str, Tensor]:
        """The scalar terms, unweighted but for their boost, for target pixels in [-1, 1], by name; those of a
        reconstruction besides the main one have its name behind a slash."""
        terms = {}
        for term in self._active(clock.step):
            factor = term.config.factor(clock.step)
            terms[term.name] = term(output, target, clock, draws) * factor
            for name in output.reconstructions if isinstance(term, PixelTerm) else ():
                other = self._reconstruction(name)
                if name != MAIN and other.active(clock.step):
                    compared = term.compare(name, output, target)
                    terms[f"{term.name}/{name}"] = compared * factor * other.factor(clock.step)
        return terms

    def _reconstruction(self, name: str) -> ReconstructionConfig:
        return self.reconstructions.get(name, ReconstructionConfig())

    def weight(self, name: str) -> float:
        """Of a term by its name in ``forward``."""
        term, _, reconstruction = name.partition("/")
        weight = self.terms[term].config.weight
        return weight * self._reconstruction(reconstruction).weight if reconstruction else weight

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms."""
        if not terms:
            raise ConfigError("losses: no term counts at this step; check start_step and until_step")
        return torch.stack([self.weight(name) * value for name, value in terms.items()]).sum()

    def reconstruction_total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted pixel and perceptual terms: what the adaptive GAN weight is balanced against."""
        chosen = {n: v for n, v in terms.items() if self.terms[n.partition("/")[0]].compares_pixels}
        if not chosen:
            raise ConfigError("losses.gan.balance=adaptive needs a pixel or perceptual term (l1, l2, lpips)")
        return self.total(chosen)


def check_terms(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> dict[str, TermConfig]:
    """The configs of the terms that are on, after checking that this tokenizer provides each.

    Raises:
        ConfigError: as above, naming the allowed terms and the nearest match.
    """
    allowed = (*(name for name, kind in TERMS.items() if kind.fits(tokenizer)), *tokenizer.loss_terms)
    configs = {}
    for name, value in losses.items():
        if name in SETTINGS:
            continue
        if name not in allowed:
            near = nearest(name, allowed)
            hint = f"; did you mean {near!r}?" if near else ""
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
    """``time`` is a weighting that only tokenizers with times can have; it is checked where LPIPS is off, too."""
    config = configs.get("lpips") or _config("lpips", 0.0, losses)
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
    return TERMS[name](name, config, tokenizer) if name in TERMS else OwnTerm(name, config)


def _reconstructions(losses: Mapping[str, Any]) -> dict[str, ReconstructionConfig]:
    sections = check(_reconstruction_sections, {"reconstructions": losses.get("reconstructions", {})}, "losses")
    return {
        name: build(ReconstructionConfig, section, f"losses.reconstructions.{name}")
        for name, section in sections["reconstructions"].items()
    }


def _reconstruction_sections(reconstructions: dict[str, dict[str, Any]]) -> None:
    """What the section is checked against."""
