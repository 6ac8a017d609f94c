"""The Frechet video distance: statistics that can be streamed, saved and added up, and their distance.

Unterthiner et al., arXiv 1812.01717. Features are I3D's 400 logits, which are float32; statistics are float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from vistok.eval.metrics import Moments, check_symmetric, frechet_distance, is_positive
from vistok.eval.video_protocols import VideoProtocol, video_protocol
from vistok.utils.files import atomic_file
from vistok.utils.tensors import opened, save_file


class ClipNetwork(Protocol):
    """What turns clips into features; ``I3DNetwork`` is one.

    Attributes:
        name, resize: go into every score's record.
        weights_sha256: of the weights file, or None.
    """

    name: str
    resize: str
    weights_sha256: str | None

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Clips (B, C, T, H, W) in 0..255 to {"pool": (B, D)}."""
        ...


class StatisticsError(ValueError):
    """Statistics of clips that are damaged, or that do not belong together."""


@dataclass
class ClipStatistics:
    """Raw sums of one side's features, with all that made them.

    Those of parts add up exactly, so that several processes, or runs that were interrupted, give what one would.

    Attributes:
        moments: of the features.
        protocol: name of the protocol.
        network, weights_sha256: what made the features.
        source: where the clips came from.
    """

    moments: Moments
    protocol: str
    network: str
    weights_sha256: str | None
    source: str

    @classmethod
    def of(
        cls, clips: Iterable[Tensor], network: ClipNetwork, protocol: VideoProtocol, *, source: str
    ) -> ClipStatistics:
        """The statistics of batches of clips (B, C, T, H, W) in [-1, 1].

        Raises:
            StatisticsError: no clips.
            ValueError: clips that the protocol does not score, or features that are not finite.
        """
        moments: Moments | None = None
        for batch in clips:
            features = network(protocol.prepare(batch))["pool"]
            if not bool(features.isfinite().all()):
                raise ValueError(f"{network.name} gives features that are not finite for clips of {source}")
            moments = moments or Moments(features.shape[1])
            moments.update(features)
        if moments is None:
            raise StatisticsError(f"there are no clips in {source}")
        return cls(moments, protocol.name, network.name, network.weights_sha256, source)

    @property
    def count(self) -> int:
        return self.moments.count

    def merge(self, other: ClipStatistics) -> ClipStatistics:
        """The statistics of both parts together.

        Raises:
            StatisticsError: parts that were made by other means.
        """
        self._require_alike(other)
        return ClipStatistics(
            self.moments.merge(other.moments), self.protocol, self.network, self.weights_sha256, self.source
        )

    def save(self, path: str | Path) -> None:
        """Write them to a safetensors file, whole or not at all."""
        told = {"protocol": self.protocol, "network": self.network, "source": self.source, "count": self.count}
        told["weights_sha256"] = self.weights_sha256
        tensors = {"sum": self.moments.sum.cpu(), "outer": self.moments.outer.cpu()}
        with atomic_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"clip_statistics": json.dumps(told)})

    @classmethod
    def load(cls, path: str | Path) -> ClipStatistics:
        """Read what ``save`` wrote.

        Raises:
            StatisticsError: an absent, damaged or foreign file.
        """
        try:
            with opened(path) as file:
                told = json.loads((file.metadata() or {})["clip_statistics"])
                moments = _checked(told["count"], file.get_tensor("sum"), file.get_tensor("outer"))
            facts = [told[name] for name in ("protocol", "network", "weights_sha256", "source")]
            if not all(isinstance(fact, str) for fact in (facts[0], facts[1], facts[3])):
                raise ValueError("protocol, network and source are texts")
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError, RecursionError) as error:
            raise StatisticsError(f"{path} holds no clip statistics of ours: {error!r}") from error
        return cls(moments, *facts)

    def _require_alike(self, other: ClipStatistics) -> None:
        for name in ("protocol", "network", "weights_sha256"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise StatisticsError(
                    f"these statistics do not belong together: {name} is {ours!r} for {self.source} and {theirs!r} for "
                    f"{other.source}"
                )


def _checked(count: Any, total: Tensor, outer: Tensor) -> Moments:
    """Moments as a file gives them; ValueError unless some clips can have had them."""
    if type(count) is not int or count < 1:
        raise ValueError(f"a number of clips is expected, got {count!r}")
    if total.ndim != 1 or outer.shape != (len(total), len(total)):
        raise ValueError(f"moments of shapes {tuple(total.shape)} and {tuple(outer.shape)}")
    if any(part.dtype != torch.float64 or not bool(part.isfinite().all()) for part in (total, outer)):
        raise ValueError("moments are finite float64")
    check_symmetric(outer)
    squares = outer.diagonal() / count
    if not is_positive(outer) or bool((squares - (total / count).square() < -1e-9 * squares.abs()).any()):
        raise ValueError("no clips have such moments: a variance would be negative")
    moments = Moments(0)
    moments.count, moments.sum, moments.outer = count, total, outer
    return moments


def frechet_video_distance(generated: ClipStatistics, real: ClipStatistics) -> dict[str, Any]:
    """The distance, with all that is needed to compare it; "fvd" only where the detector is I3D with trained weights.

    Raises:
        StatisticsError: sides that were made by other means.
    """
    generated._require_alike(real)
    protocol = video_protocol(generated.protocol)
    value = frechet_distance(generated.moments.fit(protocol.ddof), real.moments.fit(protocol.ddof))
    trained = generated.network in ("i3d-kinetics400", "i3d-torchscript")
    return {
        ("fvd" if trained else "frechet_distance"): value,
        "protocol": protocol.describe(),
        "network": {"name": generated.network, "weights_sha256": generated.weights_sha256},
        "generated": {"source": generated.source, "count": generated.count},
        "real": {"source": real.source, "count": real.count},
    }
