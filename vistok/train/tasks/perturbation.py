"""Perturbation of latents in training, for every tokenizer with one code per token (RobusTok, arXiv 2509.12474)."""

from __future__ import annotations

from dataclasses import dataclass

from vistok.quantizers import VectorQuantizer
from vistok.quantizers.perturbation import Annealing, Perturbation
from vistok.signatures import ConfigError, check_least
from vistok.tokenizers.base import Tokenizer
from vistok.types import Clock


@dataclass(frozen=True)
class PerturbationConfig:
    """The ``perturbation`` section.

    Attributes:
        rate: alpha, the probability with which a token is replaced.
        share: beta, the share of a batch's images whose tokens are replaced: the first ones of each process.
        strength: delta, the number of nearest codes from which the new one is drawn.
        anneal_start, anneal_end: steps between which rate and strength fall to ``end_ratio`` of their values; if
            ``anneal_end`` is 0, they stay.
        end_ratio: see ``Annealing``.
        anneal_every: number of steps for which rate and strength stay the same (in RobusTok, those of an epoch).
    """

    rate: float = 1.0
    share: float = 0.1
    strength: int = 100
    anneal_start: int = 0
    anneal_end: int = 0
    end_ratio: float = 0.5
    anneal_every: int = 1

    def __post_init__(self) -> None:
        check_least(self, anneal_start=0, anneal_end=0, anneal_every=1)
        Perturbation(self.rate, self.share, self.strength)
        Annealing(self.anneal_start, self.anneal_end, self.end_ratio)

    def at(self, step: int) -> Perturbation:
        """The perturbation of an optimisation step."""
        whole = Perturbation(self.rate, self.share, self.strength)
        if not self.anneal_end:
            return whole
        every = self.anneal_every
        annealing = Annealing(self.anneal_start // every, self.anneal_end // every, self.end_ratio)
        return whole.scaled(annealing.ratio(step // every))


class LatentPerturbation:
    """Sets the perturbation of a tokenizer's quantizer.

    Raises:
        ConfigError: the tokenizer has no codebook with one code per token.
    """

    def __init__(self, config: PerturbationConfig, tokenizer: Tokenizer):
        self.config = config
        spec = tokenizer.spec
        if not spec.discrete or spec.depth != 1 or spec.scales or len(quantizers(tokenizer)) != 1:
            raise ConfigError(
                f"perturbation: {type(tokenizer).__name__} has no codebook of one code per token and place; "
                "leave the section out"
            )

    def set(self, tokenizer: Tokenizer, clock: Clock) -> None:
        """Set the perturbation of this step."""
        for quantizer in quantizers(tokenizer):
            quantizer.perturbation = self.config.at(clock.step)


def quantizers(tokenizer: Tokenizer) -> list[VectorQuantizer]:
    """The vector quantizers of a tokenizer."""
    return [module for module in tokenizer.modules() if isinstance(module, VectorQuantizer)]
