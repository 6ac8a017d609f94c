"""How ids are drawn in parts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vistok.generators.engine.sampling import DecodingOptions
from vistok.guidance import Guidance, classifier_free, constant


@dataclass(frozen=True)
class SubTokenOptions(DecodingOptions):
    """The options of the first sub-token of an id; those after it take the same, but for what is given for them.

    Attributes:
        later_temperature, later_top_k, later_top_p, later_guidance_scale: of the sub-tokens after the first; None is as
            of the first.

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
        """The guidance of the first sub-token. Where later ones alone are guided, it has a null row of weight 0."""
        own, later = super().guidance, self.later_guidance_scale
        if own.is_on or later is None or not classifier_free(later).is_on:
            return own
        return classifier_free(constant(1.0))
