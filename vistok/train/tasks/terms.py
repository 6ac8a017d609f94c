"""Terms of a tokenizer's objective: its own, of pixels, and of an autoregressive prior. Those with teachers are in
``teachers``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal

from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints.bounds import OversizedError, check_bytes, construct
from vistok.config import ConfigError, check_least
from vistok.draws import Draws, Keys
from vistok.losses import L1, L2, LPIPS, ARPrior
from vistok.nn.frozen import Frozen
from vistok.tokenizers.base import Tokenizer
from vistok.types import MAIN, Clock, TokenizerOutput


@dataclass(frozen=True)
class TermConfig:
    """One term of the objective; in place of the section a number is its weight.

    Attributes:
        start_step, until_step: the step from which on it counts, and the one from which on it no longer does.
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
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")

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


class Term(nn.Module):
    """A named term. Its parameters, if it has any, are trained with the tokenizer, and end with the run."""

    config_type: ClassVar[type[TermConfig]] = TermConfig
    compares_pixels: bool = False
    """Whether the adaptive weight of a GAN is balanced against it."""
    reads_codes: bool = False
    """Whether it reads the feature "codes", the tokenizer's whole codebook."""
    reads_labels: ClassVar[bool] = False
    """Whether it reads the feature "labels", the classes of the batch."""

    def __init__(self, name: str, config: TermConfig):
        super().__init__()
        self.name, self.config = name, config

    needs: ClassVar[str] = ""
    """What a tokenizer has to give, for the error of one that does not."""

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer gives what the term reads."""
        return True

    def prepare(self, classes: Sequence[str]) -> None:
        """Get to know the names of the classes, before training."""

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that it computes with, by name."""
        return {}

    def training_draws(self, keys: Keys) -> Draws:
        """What ``forward`` draws from, under names of its own."""
        return {}

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        """The unweighted scalar, for target pixels in [-1, 1]."""
        raise NotImplementedError


class OwnTerm(Term):
    """A term that the tokenizer computes itself: the mean of the entry of its name in ``output.losses``."""

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
    needs = "it scores ids of one code each, not sums of codes of several scales or levels, and no latents"

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        spec = tokenizer.spec
        return spec.discrete and spec.depth == 1 and not spec.scales

    def __init__(self, name: str, config: ARPriorConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        spec, outer = tokenizer.spec, {field.name for field in fields(TermConfig)}
        options = {key: value for key, value in asdict(config).items() if key not in outer}
        try:
            check_bytes(
                f"losses.{name} scores every code at every token, which", 4 * spec.num_ids * (spec.length + spec.dim)
            )
            self.prior = construct(ARPrior, {"code_dim": spec.dim, "max_length": spec.length, **options})
        except (ValueError, OversizedError) as error:
            raise ConfigError(f"losses.{name}: {error}") from error
        self.length = spec.length

    def training_draws(self, keys: Keys) -> Draws:
        return self.prior.training_draws(keys, self.length)

    def forward(self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws) -> Tensor:
        quantized, codes = (output.features[name] for name in ("quantized", "codes"))
        return self.prior(quantized, output.tokens, codes, progress=clock.progress, draws=draws).loss
