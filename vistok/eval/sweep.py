"""The settings that a benchmark compares: pairs of guidance scale and temperature, each with its own folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Attributes:
        guidance_scale: None if the generator has no guidance; a tuple for a pair of scales.
        temperature: None takes the plan's.
    """

    guidance_scale: Any = None
    temperature: float | None = None

    @property
    def folder(self) -> str:
        """The name of the setting's folder."""
        scale = self.guidance_scale
        parts = scale if isinstance(scale, tuple) else (scale,)
        names = [] if scale is None else ["guidance-" + "-to-".join(map(_short, parts))]
        names += [] if self.temperature is None else [f"temperature-{_short(self.temperature)}"]
        return "-".join(names) or "samples"

    def options(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """``sampling`` with this setting's options in place of its own."""
        own = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        return {**sampling, **{name: value for name, value in own.items() if value is not None}}

    def describe(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """The setting as a result records it; ``plan`` is the plan's sampling options."""
        temperature = plan.get("temperature") if self.temperature is None else self.temperature
        return {"guidance_scale": self.guidance_scale, "temperature": temperature}

    @classmethod
    def read(cls, run: Mapping[str, Any], plan: Mapping[str, Any]) -> Setting:
        """The setting that ``describe`` recorded in a ``run``."""
        scale, temperature = run["guidance_scale"], run.get("temperature")
        return cls.over([scale], [temperature], plan)[0]

    @classmethod
    def over(
        cls, scales: Sequence[Any], temperatures: Sequence[float | None], plan: Mapping[str, Any]
    ) -> list[Setting]:
        """Every scale with every temperature, without duplicates."""
        scales = [tuple(scale) if isinstance(scale, list) else scale for scale in scales]
        own = plan.get("temperature")
        temperatures = [None if temperature == own else temperature for temperature in temperatures]
        return list(dict.fromkeys(cls(scale, temperature) for temperature, scale in product(temperatures, scales)))


def _short(value: float) -> str:
    """A number in few digits, and in all where others would look the same."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def choose_settings(
    pipe: Any,
    scales: Sequence[float] | None,
    temperatures: Sequence[float] | None,
    sampling: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> list[Setting]:
    """Every guidance scale with every temperature.

    Args:
        scales, temperatures: the values to compare; None takes the pipeline's own.
        sampling: options that differ from the pipeline's own.
        plan: the sampling options of the benchmark's plan.

    Raises:
        ValueError: the generator does not have the option that is swept, or refuses a value, or there are no values.
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
