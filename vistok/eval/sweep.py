"""Guidance scales that a benchmark compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def choose_scales(pipe: Any, scales: Sequence[float] | None, sampling: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Guidance scales with the names of their folders; a single None where the generator knows no guidance.

    Raises:
        ValueError: a sweep of a generator without guidance, or a scale that it refuses.
    """
    own = getattr(pipe.options(**sampling), "guidance_scale", None)
    if scales is None:
        scales = [own]
    elif own is None:
        raise ValueError(f"{type(pipe.generator).__name__} has no guidance scale to sweep")
    if not scales:
        raise ValueError("the sweep names no guidance scale")
    for scale in scales:
        pipe.options(**with_scale(sampling, scale))
    return [(scale, folder_name(scale)) for scale in dict.fromkeys(map(hashable, scales))]


def hashable(scale: Any) -> Any:
    """A scale as a key."""
    return tuple(scale) if isinstance(scale, list) else scale


def folder_name(scale: Any) -> str:
    """The folder of a scale's samples."""
    if scale is None:
        return "samples"
    return "guidance-" + "-to-".join(f"{part:g}" for part in (scale if isinstance(scale, tuple) else (scale,)))


def with_scale(sampling: Mapping[str, Any], scale: Any) -> dict[str, Any]:
    """Sampling options with this guidance scale, if there is one."""
    return dict(sampling) if scale is None else {**sampling, "guidance_scale": scale}
