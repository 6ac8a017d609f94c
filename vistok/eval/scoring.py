"""From the features of both sides to scores, by the rules of a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.eval import metrics as m
from vistok.eval.features import Extraction, extract_features
from vistok.eval.networks import FeatureNetwork, full_precision
from vistok.eval.protocols import METRICS, ImageProtocol
from vistok.eval.references import Reference
from vistok.utils.processes import Processes
from vistok.utils.spelling import suggestion

SHUFFLE_SEED = KID_SEED = 2020
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
PRC_SEED = 13579
ADM_SPLIT_SIZE, FIDELITY_SPLITS = 5000, 10

_MOMENTS_OF = {"fid": "pool", "sfid": "spatial"}


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        reference: its images, and what was stored of their features.
        extraction: the result of the feature pass over its images; None if the stored features suffice.
    """

    reference: Reference
    extraction: Extraction | None = None

    @property
    def count(self) -> int | None:
        """Number of images behind the Frechet distance; None if it is unknown."""
        if self.reference.gaussians:
            return self.reference.provenance.count
        return self.extraction.count if self.extraction is not None else None

    def gaussian(self, feature: str, device: torch.device) -> m.Gaussian:
        """The stored moments of a feature if there are any, as in the ADM suite; else the moments of the images."""
        gaussian = self.reference.gaussians.get(feature)
        if gaussian is None:
            gaussian = self.extracted.moments[feature].to(device).gaussian
        return m.Gaussian(*(moment.to(device) for moment in gaussian))

    @property
    def rows(self) -> Tensor:
        """Pooled features (N, D): those of the images if they were extracted, else the stored ones."""
        if self.extraction is not None and "pool" in self.extraction.features:
            return self.extraction.features["pool"]
        if self.reference.rows is None:
            raise ValueError(f"{self.reference.source} has no pooled features")
        return self.reference.rows

    @property
    def extracted(self) -> Extraction:
        """The result of the feature pass. Raises ValueError if there was none."""
        if self.extraction is None:
            raise ValueError(f"the images of {self.reference.source} were not read")
        return self.extraction


@dataclass(frozen=True)
class Scores:
    """Scores by their plain names, before ``ImageProtocol.rename``.

    Attributes:
        values: scores by name.
        inside: (N,) bool, which samples lie in the manifold of the real ones; None if unknown.
    """

    values: dict[str, float]
    inside: Tensor | None = None


def choose_metrics(
    metrics: Sequence[str] | None, protocol: ImageProtocol, sample: Reference, real: Reference
) -> tuple[list[str], list[str]]:
    """The metrics to compute, in the order of ``METRICS``, and a warning for each that cannot be computed.

    Args:
        metrics: those asked for; None asks for all that the protocol defines and both sides allow.

    Raises:
        ValueError: a metric is unknown, or not defined by the protocol; one that was asked for cannot be computed; or
            none can.
    """
    if metrics is not None and not metrics:
        raise ValueError(f"no metric is named; known: {', '.join(METRICS)}")
    for metric in metrics or ():
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}{suggestion(metric, METRICS)}")
        if metric not in protocol.metrics:
            defined = ", ".join(protocol.metrics)
            raise ValueError(f"the protocol {protocol.name!r} does not define {metric!r}; it has {defined}")
    wanted, skipped = [], []
    for metric in protocol.metrics if metrics is None else [name for name in METRICS if name in metrics]:
        obstacle = _obstacle(metric, "images", sample) or _shortage(metric, protocol, sample)
        if obstacle is None and metric != "is":  # the Inception Score needs no reference
            obstacle = _obstacle(metric, "reference", real) or _shortage(metric, protocol, real)
        if obstacle is None:
            wanted.append(metric)
        elif metrics is None:
            skipped.append(f"no {metric}: {obstacle}")
        else:
            raise ValueError(f"{metric} cannot be computed: {obstacle}")
    if not wanted:
        raise ValueError("nothing can be computed: " + "; ".join(skipped))
    return wanted, skipped


def _obstacle(metric: str, name: str, side: Reference) -> str | None:
    if metric != "is" and side.images is None and side.rows is None and not side.gaussians:
        return f"it needs {'a reference' if name == 'reference' else 'images'}, and none was given"
    if side.images is None and (metric == "is" or (metric in ("kid", "prc") and side.rows is None)):
        return f"the {name} {side.source} holds moments but no images"
    if metric == "sfid" and side.gaussians and "spatial" not in side.gaussians:
        return f"the {name} {side.source} has no spatial moments ('mu_s', 'sigma_s')"
    if metric == "fid" and side.gaussians and "pool" not in side.gaussians:
        return f"the {name} {side.source} has no moments 'mu', 'sigma'"
    return None


def _shortage(metric: str, protocol: ImageProtocol, side: Reference) -> str | None:
    """Why a side has too few images for a metric, or None; checked before any features are computed."""
    if metric in _MOMENTS_OF and side.gaussians:
        return None
    stored = side.rows if metric in ("kid", "prc") else None
    count = len(stored) if stored is not None else side.images.count if side.images is not None else 0
    fewest = {"is": FIDELITY_SPLITS if protocol.splits == "even" else 1, "prc": protocol.neighbours + 1}.get(metric, 2)
    if count >= fewest:
        return None
    return f"it needs at least {fewest} images, and {side.source} has {count}"


def extract_side(
    side: Reference,
    network: FeatureNetwork,
    metrics: Sequence[str],
    *,
    is_sample: bool,
    batch_size: int,
    processes: Processes,
) -> Side:
    """Run the network once over a side, for all ``metrics``; not at all if what is stored suffices."""
    moments = [_MOMENTS_OF[metric] for metric in metrics if metric in _MOMENTS_OF and not side.gaussians]
    keep = []
    if {"kid", "prc"} & set(metrics) and side.rows is None:
        keep.append("pool")
    if "is" in metrics and is_sample:
        keep.append("logits")
    if side.images is None or not (keep or moments):
        return Side(side)
    extraction = extract_features(
        side.images, network, keep=keep, moments=moments, batch_size=batch_size, processes=processes
    )
    return Side(side, extraction)


def compute_scores(
    protocol: ImageProtocol, metrics: Sequence[str], sample: Side, real: Side, device: torch.device
) -> Scores:
    """All ``metrics`` of ``sample`` against ``real``, computed on ``device``.

    Raises:
        ValueError: there are too few images for a metric.
    """
    values: dict[str, float] = {}
    inside = None
    # Moments are float64, which not every accelerator supports.
    float64_device = device if device.type == "cuda" else torch.device("cpu")
    with full_precision():
        for metric in metrics:
            if metric in _MOMENTS_OF:
                values[metric] = _frechet(sample, real, _MOMENTS_OF[metric], float64_device)
            elif metric == "is":
                values |= _inception_score(sample.extracted.features["logits"], protocol)
            elif metric == "kid":
                values |= _kernel_distance(*(rows.to(float64_device) for rows in (sample.rows, real.rows)))
            else:
                precision_recall, inside = _precision_recall(sample.rows, real.rows, protocol, device)
                values |= precision_recall
    return Scores(values, inside)


def _frechet(sample: Side, real: Side, feature: str, device: torch.device) -> float:
    return m.frechet_distance(sample.gaussian(feature, device), real.gaussian(feature, device))


def _inception_score(logits: Tensor, protocol: ImageProtocol) -> dict[str, float]:
    if protocol.splits == "even":
        score = m.inception_score(m.shuffled(logits, SHUFFLE_SEED), m.split_evenly(len(logits), FIDELITY_SPLITS))
        return {"is": score.mean, "is_std": score.std}
    splits = m.split_into_chunks(len(logits), ADM_SPLIT_SIZE)
    return {
        "is": m.inception_score(logits, splits).mean,
        "is_shuffled": m.inception_score(m.shuffled(logits, SHUFFLE_SEED), splits).mean,
    }


def _kernel_distance(generated: Tensor, real: Tensor) -> dict[str, float]:
    size = _kid_subset_size(generated, real)
    score = m.kernel_distance(generated, real, subsets=KID_SUBSETS, subset_size=size, seed=KID_SEED)
    return {"kid": score.mean, "kid_std": score.std}


def _kid_subset_size(generated: Tensor, real: Tensor) -> int:
    return min(KID_SUBSET_SIZE, len(generated), len(real))


def _precision_recall(
    generated: Tensor, real: Tensor, protocol: ImageProtocol, device: torch.device
) -> tuple[dict[str, float], Tensor | None]:
    chosen = [_subset(rows, protocol.prc_samples).to(device) for rows in (generated, real)]
    inside, covered = m.inside_manifold(
        *chosen, neighbours=protocol.neighbours, distance=protocol.distance, boundary=protocol.boundary
    )
    score = m.PrecisionRecall.of(inside, covered)
    values = {"precision": score.precision, "recall": score.recall, "f_score": score.f_score}
    return values, inside.cpu() if len(inside) == len(generated) else None


def _subset(rows: Tensor, count: int | None) -> Tensor:
    if count is None or len(rows) <= count:
        return rows
    return m.shuffled(rows, PRC_SEED)[:count]


def describe_metrics(protocol: ImageProtocol, metrics: Sequence[str], sample: Side, real: Side) -> dict[str, Any]:
    """What the protocol fixed for each metric, JSON-ready."""
    settings: dict[str, Any] = {}
    if "is" in metrics and protocol.splits == "even":
        settings["is"] = {"splits": FIDELITY_SPLITS, "order": "shuffled", "seed": SHUFFLE_SEED}
    elif "is" in metrics:
        settings["is"] = {"split_size": ADM_SPLIT_SIZE, "order": "file", "shuffle_seed": SHUFFLE_SEED}
    if "kid" in metrics:
        kernel = m.PolynomialKernel()._asdict()
        size = _kid_subset_size(sample.rows, real.rows)
        settings["kid"] = {"subsets": KID_SUBSETS, "subset_size": size, "seed": KID_SEED, "kernel": kernel}
        settings["kid"]["dtype"] = "float64"
    if "prc" in metrics:
        settings["prc"] = {
            "features": "pool of the same network",
            "neighbours": protocol.neighbours,
            "distance": protocol.distance,
            "boundary": protocol.boundary,
            "images": [len(_subset(side.rows, protocol.prc_samples)) for side in (sample, real)],
        }
    return settings
