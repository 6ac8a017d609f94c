"""What generators of continuous latents share: the tokens they take, and their classes."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.generators.base import Generator
from vistok.types import Condition, TokenSpec


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
