"""The guidance options of users."""

from __future__ import annotations

from dataclasses import dataclass

from vistok.guidance.rows import Guidance, classifier_free
from vistok.guidance.schedules import ScheduleName


@dataclass(frozen=True)
class GuidanceOptions:
    """Classifier-free guidance of a generator. A step is a token, an entity or an iteration of that generator.

    Attributes:
        guidance_scale: s in ``null + s * (conditional - null)``; 1 is off. A pair (first, last) rises linearly over the
            steps.
        guidance_schedule: how the scale changes over the steps, see ``vistok.guidance.schedules``.
        guidance_interval: (start, stop), the steps that are guided; the others are conditional. None guides all.
        guidance_power: of the schedule "power-cosine"; None is 1.
        guidance_window: (start, stop) in [0, 1] of the schedules "step" and "rectangular"; None is the published one.

    Raises:
        ValueError: a value that is out of its range, not finite, or not taken by the schedule.
    """

    guidance_scale: float | tuple[float, float] = 1.0
    guidance_schedule: ScheduleName = "constant"
    guidance_interval: tuple[int, int] | None = None
    guidance_power: float | None = None
    guidance_window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _ = self.guidance

    @property
    def guidance(self) -> Guidance:
        """The ``Guidance`` of these options."""
        return classifier_free(
            self.guidance_scale,
            self.guidance_schedule,
            interval=self.guidance_interval,
            power=self.guidance_power,
            window=self.guidance_window,
        )
