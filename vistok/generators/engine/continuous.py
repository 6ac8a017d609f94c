"""What generators of continuous latents share: the tokens they take, their classes, guidance that may rise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.generators.base import Generator
from vistok.types import Condition, TokenSpec


@dataclass(frozen=True)
class GuidanceOptions:
    """Classifier-free guidance (arXiv 2207.12598) of a generator that works in rounds.

    Attributes:
        guidance_scale: s in ``null + s * (conditional - null)``; 1 is off.
        guidance_schedule: ``constant``, or ``linear``: the scale rises from 1 with the share of the image that is done.

    Raises:
        ValueError: a negative scale, or an unknown schedule.
    """

    guidance_scale: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative (1 is off), got {self.guidance_scale}")
        if self.guidance_schedule not in ("linear", "constant"):
            raise ValueError(f"guidance_schedule must be 'linear' or 'constant', got {self.guidance_schedule!r}")

    @property
    def guided(self) -> bool:
        """Whether null rows are needed at all."""
        return self.guidance_scale != 1

    def scale_at(self, progress: float) -> float:
        """The scale when this share of the image, 0 to 1, is done."""
        return 1 + (self.guidance_scale - 1) * (progress if self.guidance_schedule == "linear" else 1.0)


class ContinuousGenerator(Generator):
    """A generator of standardised latents (B, L, D), unconditional or conditioned on a class."""

    num_classes: int | None

    @staticmethod
    def check_spec(spec: TokenSpec, model: str) -> TokenSpec:
        """Return the spec of continuous tokens; ValueError for others."""
        if spec.discrete:
            raise ValueError(
                f"{model} generates continuous latents; this tokenizer has {spec.codebook_size} discrete codes"
            )
        return spec

    def class_rows(self, condition: Condition) -> Tensor:
        """(R,) int64: the class of every row, ``num_classes`` for dropped ones."""
        null = torch.full_like(condition.dropped, self.num_classes or 0, dtype=torch.int64)
        return null if condition.labels is None else torch.where(condition.dropped, null, condition.labels)
