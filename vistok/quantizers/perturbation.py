"""Perturbation of latents: tokens are exchanged for near ones, to imitate errors of a generator.

Qiu et al., "Robust Latent Matters" (arXiv 2503.08354) and "Image Tokenizer Needs Post-Training" (arXiv 2509.12474).
Training on such latents makes a decoder tolerate the errors; pFID measures how much they harm it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vistok.draws import Draws, Keys

EXCHANGE, RANK = "perturbation.exchange", "perturbation.rank"


@dataclass(frozen=True)
class Perturbation:
    """How tokens are exchanged.

    Attributes:
        rate: alpha, the probability with which a token is exchanged, in [0, 1].
        share: beta, the share of the images of a batch whose tokens are exchanged, in [0, 1]; their number is rounded
            down.
        strength: delta, the number of nearest codes among which the new one is drawn, clamped to the codebook's size.
            The nearest is one of them, so the share of changed tokens is alpha (1 - 1 / delta).

    Raises:
        ValueError: a value out of its range.
    """

    rate: float = 1.0
    share: float = 0.1
    strength: int = 100

    def __post_init__(self) -> None:
        for name in ("rate", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"perturbation {name} must lie in [0, 1], got {getattr(self, name)}")
        if self.strength < 1:
            raise ValueError(f"perturbation strength must be at least 1 code, got {self.strength}")

    def scaled(self, ratio: float) -> Perturbation:
        """This perturbation with ``ratio`` (0..1) of its rate and strength; the share of the images stays."""
        return replace(self, rate=ratio * self.rate, strength=max(int(ratio * self.strength), 1))

    def rows(self, batch: int) -> int:
        """How many of ``batch`` images are perturbed: the first ones."""
        return int(batch * self.share)


@dataclass(frozen=True)
class Annealing:
    """A ratio that is 1 until ``start``, falls linearly to 1 - ``end_ratio`` at ``end``, and is ``end_ratio`` after it.

    With an ``end_ratio`` other than 0.5 it jumps after ``end``, as in the reference. The caller chooses the unit of
    time (epochs in the reference).

    Raises:
        ValueError: ``start`` is negative or after ``end``, or a ratio outside [0, 1].
    """

    start: float = 40
    end: float = 120
    end_ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"annealing must start before it ends, got start {self.start} and end {self.end}")
        if not 0 <= self.end_ratio <= 1:
            raise ValueError(f"end_ratio must lie in [0, 1], got {self.end_ratio}")

    def ratio(self, time: float) -> float:
        """The ratio at ``time``."""
        if time < self.start:
            return 1.0
        if time > self.end:
            return self.end_ratio
        return 1 - (time - self.start) / max(self.end - self.start, 1e-9) * self.end_ratio


def perturbation_draws(keys: Keys, length: int) -> Draws:
    """The draws of ``perturb`` for sequences of ``length``: two tensors (B, L) of uniform numbers."""
    return {name: keys.uniform(name, length) for name in (EXCHANGE, RANK)}


def ranks(rate: float, strength: int, draws: Draws) -> Tensor:
    """(B, L) int64, the rank of the code that each token becomes, drawn uniformly; 0 is the nearest code."""
    drawn = (draws[RANK] * strength).long().clamp_max(strength - 1)
    return torch.where(draws[EXCHANGE] < rate, drawn, 0)


def perturb(neighbours: Tensor, rate: float, strength: int, draws: Draws) -> Tensor:
    """Exchange each token, with probability ``rate``, for a code drawn uniformly from the ``strength`` nearest ones.

    Args:
        neighbours: (B, L, k) ids, k >= strength, nearest to the encoder's output first, as ``quantizer.neighbours``
            returns them.
        draws: from ``perturbation_draws``.

    Returns:
        (B, L) ids.
    """
    chosen = ranks(rate, strength, {name: draws[name].to(neighbours.device) for name in (EXCHANGE, RANK)})
    return neighbours.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
