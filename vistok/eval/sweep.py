"""The settings that a benchmark compares: guidance scales and temperatures, each with a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Attributes:
        guidance_scale: None where the generator knows no guidance; a pair of scales as a tuple.
        temperature: None takes that of the plan.
    """

    guidance_scale: Any = None
    temperature: float | None = None

    @property
    def folder(self) -> str:
        """The name of its folder."""
        scale = self.guidance_scale
        parts = scale if isinstance(scale, tuple) else (scale,)
        names = [] if scale is None else ["guidance-" + "-to-".join(f"{part:g}" for part in parts)]
        names += [] if self.temperature is None else [f"temperature-{self.temperature:g}"]
        return "-".join(names) or "samples"

    def options(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling options with those of this setting."""
        own = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        return {**sampling, **{name: value for name, value in own.items() if value is not None}}

    def describe(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """What a result says of it, with the ``plan``'s own sampling options."""
        temperature = plan.get("temperature") if self.temperature is None else self.temperature
        return {"guidance_scale": self.guidance_scale, "temperature": temperature}

    @classmethod
    def read(cls, run: Mapping[str, Any], plan: Mapping[str, Any]) -> Setting:
        """The setting of a ``run`` that ``describe`` wrote into."""
        scale, temperature = run["guidance_scale"], run.get("temperature")
        return cls.over([scale], [temperature], plan)[0]

    @classmethod
    def over(
        cls, scales: Sequence[Any], temperatures: Sequence[float | None], plan: Mapping[str, Any]
    ) -> list[Setting]:
        """Every scale with every temperature, without repeats."""
        scales = [tuple(scale) if isinstance(scale, list) else scale for scale in scales]
        own = plan.get("temperature")
        temperatures = [None if temperature == own else temperature for temperature in temperatures]
        return list(dict.fromkeys(cls(scale, temperature) for temperature, scale in product(temperatures, scales)))


def choose_settings(
    pipe: Any,
    scales: Sequence[float] | None,
    temperatures: Sequence[float] | None,
    sampling: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> list[Setting]:
    """Every guidance scale with every temperature; those of the pipeline where no others are named.

    Args:
        pipe: a pipeline.
        sampling: options that differ from its own.
        plan: the sampling options of the benchmark's plan.

    Raises:
        ValueError: a sweep of what the generator does not know, or a value that it refuses.
    """
    options, swept = pipe.options(**sampling), list[Sequence[Any]]()
    for name, values in (("guidance_scale", scales), ("temperature", temperatures)):
        own, word = getattr(options, name, None), name.replace("_", " ")
        if values is not None and own is None:
            raise ValueError(f"{type(pipe.generator).__name__} has no {word} to sweep")
        if values is not None and not values:
            raise ValueError(f"the sweep names no {word}")
        swept.append([own] if values is None else values)
    settings = Setting.over(swept[0], swept[1], plan)
    for setting in settings:
        pipe.options(**setting.options(sampling))
    return settings
