"""Sampling options for ids that are drawn in sub-tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vistok.generators.engine.sampling import DecodingOptions
from vistok.guidance import Guidance, classifier_free, constant


@dataclass(frozen=True)
class SubTokenOptions(DecodingOptions):
    """Options for the first sub-token of an id, with overrides for the later ones.

    Attributes:
        later_temperature, later_top_k, later_top_p, later_guidance_scale: of the sub-tokens after the first; None takes
            the first one's.

    Raises:
        ValueError: a value out of its range or not finite.
    """

    later_temperature: float | None = None
    later_top_k: int | None = None
    later_top_p: float | None = None
    later_guidance_scale: float | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.of_part(1)
        except ValueError as error:
            raise ValueError(f"of the later sub-tokens: later_{error}") from error

    def of_part(self, part: int) -> DecodingOptions:
        own = {
            "temperature": self.later_temperature,
            "top_k": self.later_top_k,
            "top_p": self.later_top_p,
            "guidance_scale": self.later_guidance_scale,
        }
        values = {field.name: vars(self)[field.name] for field in fields(DecodingOptions)}
        return DecodingOptions(**values | {name: value for name, value in own.items() if part and value is not None})

    @property
    def guidance(self) -> Guidance:
        """The guidance of the first sub-token. If only later ones are guided, it has a null row of weight 0."""
        own, later = super().guidance, self.later_guidance_scale
        if own.is_on or later is None or not classifier_free(later).is_on:
            return own
        return classifier_free(constant(1.0))
