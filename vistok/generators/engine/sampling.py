"""From logits to token ids: guidance, temperature, truncation, and inverse-CDF drawing.

Classifier-free guidance: Ho & Salimans, arXiv 2207.12598. Nucleus (top-p) sampling: Holtzman et al., arXiv 1904.09751.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.draws import inverse_cdf


@dataclass(frozen=True)
class DecodingOptions:
    """How ids are drawn from a discrete autoregressive model.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely id.
        top_k: only the k most likely ids (and ties with the k-th) can be drawn; 0 is off.
        top_p: only the smallest set of likeliest ids whose probability reaches top_p can be drawn; 1 is off.
        guidance_scale: s in ``null + s * (conditional - null)``; 1 is off. A pair (first, last) rises linearly over
            the sequence.
        guidance_interval: (start, stop) token positions that are guided, or None for all; others are conditional.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float | tuple[float, float] = 1.0
    guidance_interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a number of ids, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], 1 is off; got {self.top_p}")
        if min(self._ends()) < 0:
            raise ValueError(f"guidance_scale must not be negative (1 is off), got {self.guidance_scale}")

    def _ends(self) -> tuple[float, float]:
        scale = self.guidance_scale
        return (scale[0], scale[1]) if isinstance(scale, tuple | list) else (scale, scale)

    @property
    def guided(self) -> bool:
        """Whether null rows are needed at all."""
        return self._ends() != (1, 1)

    def guidance_scales(self, length: int) -> list[float]:
        """The scale of each of ``length`` positions."""
        first, last = self._ends()
        start, stop = self.guidance_interval or (0, length)
        slope = (last - first) / max(length - 1, 1)
        return [first + slope * i if start <= i < stop else 1.0 for i in range(length)]


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Combine logits (2B, V), conditional rows first, null rows second, into (B, V). A scale of 1 leaves the former to
    the last bit; one in a tensor is not read by the host."""
    conditional, null = logits.chunk(2)
    if isinstance(scale, Tensor):
        return torch.where(scale == 1, conditional, null + scale * (conditional - null))
    return conditional if scale == 1 else null + scale * (conditional - null)


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Divide by the temperature, then set what top-k and then top-p exclude to -inf; (..., V) -> (..., V).

    The likeliest id always stays. Ids equal to the k-th largest logit stay.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # An id goes if the ids before it already reach top_p.
        excluded = probabilities.cumsum(-1) - probabilities >= top_p
        excluded[..., 0] = False
        logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return logits


def draw_ids(logits: Tensor, uniforms: Tensor, options: DecodingOptions) -> Tensor:
    """Draw one id per row of guided logits (B, V) with uniforms (B,); (B,) int64."""
    if options.temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    return inverse_cdf(logits.softmax(-1), uniforms)
