"""The Frechet video distance, and the statistics that it compares; these can be streamed, saved and added up.

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
from vistok.eval.video_protocols import DETECTORS, VideoProtocol, video_protocol
from vistok.utils.files import atomic_file
from vistok.utils.tensors import opened, save_file


class ClipNetwork(Protocol):
    """A feature network of clips, such as ``I3DNetwork``.

    Attributes:
        name, resize: name and resize rule, which every score records.
        weights_sha256: of the weights file, or None.
    """

    name: str
    resize: str
    weights_sha256: str | None

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Features {"pool": (B, D)} of clips (B, C, T, H, W) in 0..255."""
        ...


class StatisticsError(ValueError):
    """Statistics of clips are damaged, or two statistics were made by different means."""


@dataclass
class ClipStatistics:
    """Raw sums of one side's features, and how they were made.

    The sums of parts add up, so several processes or interrupted runs give the same statistics as one run.

    Attributes:
        moments: of the features.
        protocol: name of the protocol.
        network, weights_sha256: name and weights of the feature network.
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
            StatisticsError: there are no clips.
            ValueError: the clips' shape is not the protocol's, or features are not finite.
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
            StatisticsError: protocol, network or weights differ.
        """
        self._require_alike(other)
        return ClipStatistics(
            self.moments.merge(other.moments), self.protocol, self.network, self.weights_sha256, self.source
        )

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file, atomically."""
        recorded = {"protocol": self.protocol, "network": self.network, "source": self.source, "count": self.count}
        recorded["weights_sha256"] = self.weights_sha256
        tensors = {"sum": self.moments.sum.cpu(), "outer": self.moments.outer.cpu()}
        with atomic_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"clip_statistics": json.dumps(recorded)})

    @classmethod
    def load(cls, path: str | Path) -> ClipStatistics:
        """Read what ``save`` wrote.

        Raises:
            StatisticsError: the file is absent or damaged, or ``save`` did not write it.
        """
        try:
            with opened(path) as file:
                recorded = json.loads((file.metadata() or {})["clip_statistics"])
                moments = _checked(recorded["count"], file.get_tensor("sum"), file.get_tensor("outer"))
            facts = [recorded[name] for name in ("protocol", "network", "weights_sha256", "source")]
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
    """Moments read from a file; ValueError if no set of clips can have them."""
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
    """The Frechet video distance, and everything that is needed to compare it.

    Returns:
        The distance as ``fvd`` if the network is the protocol's detector, else as ``frechet_distance``; ``protocol``,
        ``network``, and source and count of the sides ``generated`` and ``real``.

    Raises:
        StatisticsError: protocol, network or weights of the sides differ.
    """
    generated._require_alike(real)
    protocol = video_protocol(generated.protocol)
    value = frechet_distance(generated.moments.fit(protocol.ddof), real.moments.fit(protocol.ddof))
    return {
        ("fvd" if generated.network in DETECTORS[protocol.detector] else "frechet_distance"): value,
        "protocol": protocol.describe(),
        "network": {"name": generated.network, "weights_sha256": generated.weights_sha256},
        "generated": {"source": generated.source, "count": generated.count},
        "real": {"source": real.source, "count": real.count},
    }
