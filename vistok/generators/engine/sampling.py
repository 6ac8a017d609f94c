"""From logits to token ids: temperature, truncation, and inverse-CDF drawing.

Nucleus (top-p) sampling: Holtzman et al., arXiv 1904.09751.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from vistok.draws import inverse_cdf
from vistok.guidance import GuidanceOptions

DecodingName = Literal["plain", "jacobi", "cautious"]
DraftName = Literal["random", "repeat_left", "repeat_above"]
CriterionName = Literal["speculative", "exact"]
OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "jacobi": ("window", "draft", "criterion", "coupled"),
    "cautious": ("entropy_threshold", "trials", "trial_length"),
}
"""By decoding, the options that only this decoding reads."""


@dataclass(frozen=True)
class DecodingOptions(GuidanceOptions):
    """How ids are drawn from a discrete autoregressive model.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely id.
        top_k: only the k most likely ids (and ties with the k-th) can be drawn; 0 is off.
        top_p: only the smallest set of likeliest ids whose probability reaches top_p can be drawn; 1 is off.
        decoding: ``plain`` draws one token after another, ``jacobi`` several in a pass, from the same distribution,
            ``cautious`` keeps the likeliest of several draws where the model is unsure (see
            ``vistok.generators.engine.decodings``).
        window: (``jacobi``) positions fed per pass.
        draft: (``jacobi``) the first guess of a token: a random id, or the token to the left or above.
        criterion: (``jacobi``) ``speculative`` accepts a draft by the ratio of its probabilities; ``exact`` accepts a
            draft that equals the id drawn now, which reproduces the ids of ``plain``.
        coupled: (``jacobi``) draw the drafts of a position with the same Gumbel noise in all passes, so that they
            change less, and more are accepted.
        entropy_threshold: (``cautious``) draw several continuations where the next token's entropy, in nats and before
            temperature and truncation, exceeds this.
        trials: (``cautious``) the number of continuations.
        trial_length: (``cautious``) a continuation ends at the next multiple of this many tokens; 0 is a row of the
            raster.

    The others are those of ``GuidanceOptions``: guidance combines logits, and its step is a token.

    Raises:
        ValueError: a value out of its range or not finite.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    decoding: DecodingName = "plain"
    window: int = 16
    draft: DraftName = "random"
    criterion: CriterionName = "speculative"
    coupled: bool = False
    entropy_threshold: float = 2.0
    trials: int = 4
    trial_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a number of ids, got {self.top_k}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not 0 <= self.entropy_threshold < math.inf:
            raise ValueError(f"entropy_threshold must be 0 or more nats, and finite, got {self.entropy_threshold}")
        if self.trials < 1 or self.trial_length < 0:
            raise ValueError(
                "trials must be at least 1 and trial_length 0 (a row) or more, got "
                f"{self.trials} and {self.trial_length}"
            )
        for name, names in (("decoding", DecodingName), ("draft", DraftName), ("criterion", CriterionName)):
            if getattr(self, name) not in get_args(names):
                raise ValueError(f"{name} must be one of {', '.join(get_args(names))}, got {getattr(self, name)!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], 1 is off; got {self.top_p}")

    def of_part(self, part: int) -> DecodingOptions:
        """The options for part number ``part`` of an id, for models that draw ids in parts; by default the same for
        all parts."""
        return self


DEFAULTS = {field.name: field.default for field in fields(DecodingOptions)}


def refuse_without_effect(options: DecodingOptions, given: Collection[str]) -> None:
    """Raise ValueError if an option in ``given`` that is not at its default belongs to another decoding."""
    for decoding, names in OPTIONS_OF.items():
        idle = [name for name in given if name in names and getattr(options, name) != DEFAULTS[name]]
        if idle and options.decoding != decoding:
            raise ValueError(
                f"{idle[0]} has no effect with decoding {options.decoding!r}; leave it out, or give decoding "
                f"{decoding!r}"
            )


def part_draws(num_parts: int) -> tuple[str, ...]:
    """The names of the uniform numbers for drawing each part of an id."""
    return ("ids", *(f"ids_{part}" for part in range(1, num_parts)))


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Divide by the temperature, then set the logits that top-k and then top-p exclude to -inf; (..., V) -> (..., V).

    The likeliest id always stays. Ids whose logit equals the k-th largest stay.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # An id is excluded if the more likely ids already reach top_p.
        excluded = probabilities.cumsum(-1) - probabilities >= top_p
        excluded[..., 0] = False
        logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return logits


def draw_ids(logits: Tensor, uniforms: Tensor | None, options: DecodingOptions) -> Tensor:
    """Draw ids (...) int64 from guided logits (..., V).

    Logits that are not finite give an arbitrary id below V; the caller must check them.

    Args:
        uniforms: (...) in [0, 1); may be None at temperature 0, which takes the likeliest id.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    if uniforms is None:
        raise ValueError(f"drawing at temperature {options.temperature} needs uniforms")
    logits = filter_logits(logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    return inverse_cdf_ids(logits, uniforms)


def inverse_cdf_ids(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (...) drawn from the softmax of logits (..., V) by inverse CDF, with uniforms (...) in [0, 1)."""
    return inverse_cdf(logits.softmax(-1).flatten(0, -2), uniforms.flatten()).view(logits.shape[:-1])
