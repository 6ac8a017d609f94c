"""Terms of a tokenizer's objective: its own terms, pixel and perceptual terms, and an autoregressive prior. Terms with
other frozen networks are in ``teachers``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal

from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints.bounds import OversizedError, check_bytes, construct
from vistok.draws import Draws, Keys
from vistok.losses import L1, L2, LPIPS, ARPrior
from vistok.nn.frozen import Frozen
from vistok.signatures import ConfigError, check_least
from vistok.tokenizers.base import Tokenizer
from vistok.types import MAIN, Clock, TokenizerOutput


@dataclass(frozen=True)
class TermConfig:
    """The config of a term. A number in place of the section is its weight.

    Attributes:
        weight: of the term in the sum.
        start_step, until_step: the first step at which the term is active, and the first at which it no longer is.
        boost, boost_steps: the term is multiplied by 1 + boost at step 0, which falls linearly to 1 at ``boost_steps``
            (Open-MAGVIT2 does so for the even use of its codes). The log shows the multiplied value.
    """

    weight: float
    start_step: int = 0
    until_step: int | None = None
    boost: float = 0.0
    boost_steps: int = 2000

    def __post_init__(self) -> None:
        check_least(self, start_step=0, boost=0, boost_steps=1)
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and not negative, got {self.weight}")

    def factor(self, step: int) -> float:
        """The factor of the boost at a step."""
        return 1 + self.boost * max(0.0, 1 - step / self.boost_steps)

    def active(self, step: int) -> bool:
        return self.start_step <= step and (self.until_step is None or step < self.until_step)

    @property
    def changes(self) -> tuple[int, ...]:
        """The steps after which the term begins or ends."""
        return tuple(step for step in (self.start_step, self.until_step) if step)


@dataclass(frozen=True)
class ReconstructionConfig(TermConfig):
    """The config of a reconstruction besides the main one; its weight multiplies those of all terms that compare
    pixels."""

    weight: float = 1.0


class Term(nn.Module):
    """A named term. Its parameters, if it has any, are trained with the tokenizer, but not exported."""

    config_type: ClassVar[type[TermConfig]] = TermConfig
    compares_pixels: bool = False
    """Whether the adaptive weight of a GAN balances this term."""
    reads_codes: bool = False
    """Whether the term reads the feature "codes", the tokenizer's whole codebook."""
    reads_labels: ClassVar[bool] = False
    """Whether the term reads the feature "labels", the classes of the batch."""

    def __init__(self, name: str, config: TermConfig):
        super().__init__()
        self.name, self.config = name, config

    needs: ClassVar[str] = ""
    """What a tokenizer must provide, for error messages."""

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer provides what the term reads."""
        return True

    def prepare(self, classes: Sequence[str]) -> None:
        """Prepare for training, with the names of the classes."""

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that the term uses, by name."""
        return {}

    def training_draws(self, keys: Keys) -> Draws:
        """The random tensors that ``forward`` consumes, under names of its own."""
        return {}

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        """The unweighted scalar term, for target pixels in [-1, 1].

        Args:
            tokenizer: the one that made ``output``: the trained one, or in validation the averaged one.
        """
        raise NotImplementedError


class OwnTerm(Term):
    """A term that the tokenizer computes itself: the mean of ``output.losses[name]``."""

    def __init__(self, name: str, config: TermConfig):
        super().__init__(name, config)
        self.compares_pixels = name == "logit_laplace"

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        return output.losses[self.name].mean()


class PixelTerm(Term):
    """A term that compares a reconstruction with the target, and applies to each reconstruction."""

    compares_pixels = True

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return tokenizer.reconstructs

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        return self.compare(MAIN, output, target)

    def compare(self, reconstruction: str, output: TokenizerOutput, target: Tensor) -> Tensor:
        """The scalar for one of the output's reconstructions."""
        raise NotImplementedError


class DistanceTerm(PixelTerm):
    """A distance between pixels in the tokenizer's native range, so that weights have the scale of its paper."""

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
        weighting: ``time`` multiplies the distance of an image by 2t, where t is its time in a flow tokenizer's
            training.
        pixels: ``public`` passes pixels in [-1, 1], as LPIPS expects; ``native`` passes them in the tokenizer's range,
            as recipes in [0, 1] do.
    """

    weights: str | None = None
    weighting: Literal["uniform", "time"] = "uniform"
    pixels: Literal["public", "native"] = "public"


class PerceptualTerm(PixelTerm):
    """LPIPS. Weight maps have no effect on it; clips are compared frame by frame."""

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
        if pixels.ndim == 5:
            pixels, target = (rearrange(clips, "b c t h w -> (b t) c h w") for clips in (pixels, target))
        distances = self.lpips.network(self.as_seen(pixels), self.as_seen(target))
        factor = 2 * output.features["time"] if self.config.weighting == "time" else 1
        return (distances * factor).mean()


@dataclass(frozen=True)
class ARPriorConfig(TermConfig):
    """The config of the autoregressive prior; see ``ARPrior`` for all keys."""

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
    """The cross entropy, in nats per token, of a small autoregressive model that is trained with the tokenizer, so that
    the tokens become easy to predict."""

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

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        quantized, codes = (output.features[name] for name in ("quantized", "codes"))
        return self.prior(quantized, output.tokens, codes, progress=clock.progress, draws=draws).loss
