"""The settings of a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vistok.signatures import check_least
from vistok.types import to_json

PLAN = "plan.json"


@dataclass(frozen=True)
class ProbeSettings:
    """How a tokenizer is evaluated.

    Attributes:
        steps: training steps of the small generator; 0 trains none.
        train_images: number of images, evenly spread, on which generator and linear probes are trained; None takes all.
        test_images: number of images for all scores; None takes all.
        train_split, test_split: the splits of the data.
        batch_size: of the generator's training.
        generator: ``key=value`` changes to the generator's config, discrete.yaml or continuous.yaml of this folder.
        network: feature network for the distance of reconstructions: "efficientnet_lite0" (the default for images),
            whose weights come with the extra ``teachers``; "inception", the network of all published FIDs; or "none".
            For clips "i3d"; "i3d_torchscript", which runs the code in the file ``weights``; or "none" (the default).
        weights: local file with the weights of ``network``.
        lpips_weights: local file with all LPIPS weights; None computes no LPIPS.
        seed: of the generator's training.

    Raises:
        ValueError: a number is too small, both splits are the same, or there are weights without a network.
    """

    steps: int = 1000
    train_images: int | None = 50_000
    test_images: int | None = 10_000
    train_split: str | None = "train"
    test_split: str | None = "test"
    batch_size: int = 64
    generator: tuple[str, ...] = ()
    network: str | None = None
    weights: str | None = None
    lpips_weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, steps=0, batch_size=1, seed=0)
        for name in ("train_images", "test_images"):
            if (value := getattr(self, name)) is not None and value < 10:
                raise ValueError(f"{name} must be at least 10, or None for all, got {value}")
        if self.train_split == self.test_split:
            raise ValueError(
                f"the probe would be scored on what it was fitted to: train_split and test_split are both "
                f"{self.train_split!r}"
            )
        if self.weights is not None and self.network == "none":
            raise ValueError("weights are those of a network, and there is none; name it, or leave weights out")

    def plan(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a results folder: these settings, and ``what`` is evaluated."""
        return to_json(asdict(self) | dict(what))
