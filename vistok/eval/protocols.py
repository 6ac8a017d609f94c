"""Protocols: everything that has to be equal for two scores to be comparable, under one name.

A protocol fixes the feature network, how images are resized to its input, the splits of the Inception Score, and the
distances of precision and recall. All networks run in float32 without TF32; images are 8 bit. Every score is recorded
with ``ImageProtocol.describe``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.data.decoding import Reading
from vistok.eval.dinov2 import DINOV2, DINOv2
from vistok.eval.metrics import Boundary, Distance
from vistok.eval.networks import INCEPTION, CallableNetwork, FeatureNetwork, InceptionV3Compat
from vistok.eval.resize import Rule
from vistok.utils.spelling import suggestion

METRICS = ("fid", "sfid", "is", "kid", "prc")
UINT8_RULE = "files as stored; float pixels in [-1, 1] by 127.5 x + 128, truncated"


@dataclass(frozen=True)
class ImageProtocol:
    """What one protocol fixes.

    Attributes:
        metrics: the metrics of ``METRICS`` that it defines.
        network: name of the feature network; None for a network of the user's own.
        resize: the rule by which images are resized to the network's input; None if the network resizes them.
        splits: of the Inception Score: "chunks" of 5,000 in file order, or "even", 10 parts of the shuffled rows.
        distance, neighbours, boundary: of precision and recall, which use the same network.
        reading: how image files are read; "raw" if the suite that the protocol follows reads them so.
        prc_samples: images per side for precision and recall (a fixed random choice); None takes all.
        score_names: names in place of the plain ones, for scores that must not be confused with another protocol's.
    """

    name: str
    metrics: tuple[str, ...]
    network: str | None = INCEPTION
    resize: Rule | None = "tf1-bilinear"
    splits: str = "even"
    distance: Distance = "euclidean"
    neighbours: int = 3
    boundary: Boundary = "included"
    prc_samples: int | None = None
    reading: Reading = "photo"
    score_names: Mapping[str, str] = field(default_factory=dict)

    def describe(self, network: FeatureNetwork) -> dict[str, Any]:
        """The network and the preprocessing of its images, JSON-ready."""
        return {
            "name": network.name,
            "weights_sha256": network.weights_sha256,
            "resize": network.resize,
            "uint8": UINT8_RULE,
            "dtype": "float32",
            "tf32": False,
        }

    def rename(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Scores under the names that this protocol gives them."""
        return {self.score_names.get(name, name): value for name, value in scores.items()}


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # The TensorFlow suite of guided-diffusion (ADM), with which nearly every paper computes its numbers.
        ImageProtocol(
            "adm", ("fid", "sfid", "is", "prc"), splits="chunks", distance="squared_euclidean_float16", reading="raw"
        ),
        # torch-fidelity's command line with feature_extractor="inception-v3-compat".
        ImageProtocol("torch-fidelity", ("fid", "is", "kid", "prc")),
        # Parmar et al., arXiv 2104.11222: the same network after an antialiased resize.
        ImageProtocol(
            "clean-fid",
            ("fid", "kid"),
            resize="pil-bicubic-float",
            reading="raw",
            score_names={"fid": "clean_fid", "kid": "clean_kid", "kid_std": "clean_kid_std"},
        ),
        # Stein et al., arXiv 2306.04675 (dgm-eval).
        ImageProtocol(
            "dinov2",
            ("fid", "prc"),
            network=DINOV2,
            resize="pil-bicubic-8bit",
            reading="raw",
            neighbours=5,
            boundary="excluded",
            prc_samples=10_000,
            score_names={"fid": "fd_dinov2"},
        ),
        # rFID; vistok.eval.pairs adds the scores of pairs.
        ImageProtocol("reconstruction", ("fid",), score_names={"fid": "rfid"}),
    )
}
# For a network of the user's own: the same arithmetic on its features, under names that cannot be mistaken for FID.
CUSTOM = ImageProtocol(
    "custom-network",
    ("fid", "kid", "prc"),
    network=None,
    resize=None,
    score_names={"fid": "frechet_distance", "kid": "kernel_distance", "kid_std": "kernel_distance_std"},
)


def choose_protocol(name: str, features: Callable | None, network: str | None) -> ImageProtocol:
    """The protocol of this name, or ``CUSTOM`` if the user gives a feature function.

    Args:
        features, network: the feature function and its name, both or neither.

    Raises:
        ValueError: the protocol is unknown or fixes its own network, or a function comes without a name.
    """
    if name not in PROTOCOLS:
        from vistok.eval.video_protocols import VIDEO_PROTOCOLS

        raise ValueError(
            f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}; of a tokenizer: reconstruction, perturbation; "
            f"of clips: {', '.join(VIDEO_PROTOCOLS)}{suggestion(name, [*PROTOCOLS, 'perturbation', *VIDEO_PROTOCOLS])}"
        )
    if (features is None) != (network is None):
        raise ValueError("features and network belong together: the network's name goes into the record of its scores")
    if features is None:
        return PROTOCOLS[name]
    if name in ("adm", "clean-fid", "dinov2"):
        raise ValueError(
            f"the protocol {name!r} fixes its network, {PROTOCOLS[name].network}; it cannot be used with {network!r}"
        )
    return CUSTOM


def load_network(
    protocol: ImageProtocol,
    *,
    weights: str | Path | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    network: str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """The feature network of a protocol.

    Args:
        weights: file with the network's weights; downloaded once if None.
        features, network: the user's own function and its name, for ``CUSTOM``.

    Raises:
        CheckpointError: the weights are absent, damaged or of another network, or cannot be downloaded.
        ValueError: weights were given together with a function.
    """
    if features is not None:
        if weights is not None:
            raise ValueError("weights are those of the protocol's network; with features=, the function brings its own")
        return CallableNetwork(features, str(network))
    if protocol.network == DINOV2:
        return DINOv2.load(weights, device=device)
    return InceptionV3Compat.load(weights, resize=protocol.resize or "tf1-bilinear", device=device)
