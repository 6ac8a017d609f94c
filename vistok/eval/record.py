"""What is written beside a score, so that another person can tell whether it is comparable with theirs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vistok._version import __version__
from vistok.eval.features import INCEPTION, PUBLISHED_HASH, Extraction, FeatureNetwork
from vistok.eval.images import ImageSet
from vistok.eval.references import Reference
from vistok.files import write_json

RESULT_FILE = "result.json"
FEW_SAMPLES = 10_000
KID_SUBSET_SIZE = 1000  # of torch-fidelity


def save_result(result: dict[str, Any], folder: str | Path) -> Path:
    """Write ``result.json`` into ``folder`` (made if needed), atomically, and return its path.

    Raises:
        ValueError: a score that is not finite.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, result)
    return path


def describe_images(images: ImageSet, extraction: Extraction | None = None) -> dict[str, Any]:
    """Source, count, size and number of lossy files; after a feature pass also fingerprint and distinct images."""
    described = {
        "source": images.source,
        "count": images.count,
        "size": list(images.size),
        "lossy": images.lossy,
    }
    if extraction is not None:
        described |= {"distinct": extraction.distinct, "fingerprint": extraction.fingerprint}
    return described


def describe_reference(reference: Reference, extraction: Extraction | None) -> dict[str, Any]:
    """As its images, where these were looked at; stored moments have their own count and hash."""
    described: dict[str, Any] = {"source": reference.source, "moments": "stored" if reference.gaussians else "computed"}
    if extraction is not None:
        described |= describe_images(reference.images, extraction)
    if reference.gaussians:
        described |= {"moments_count": reference.count, "moments_sha256": reference.moments_sha256}
    return described


def library_versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "torch-fidelity", "numpy", "pillow")}
    return {"vistok": __version__, "python": platform.python_version()} | libraries


def comparability_warnings(
    images: ImageSet,
    reference: Reference,
    network: FeatureNetwork,
    sample: Extraction,
    real: Extraction | None,
    scores: dict[str, float],
    settings: dict[str, Any],
) -> list[str]:
    """What makes scores incomparable with published ones, as far as can be told, and by how much where that is known.

    Args:
        sample, real: what the feature pass over each side left; ``real`` is None if only stored moments were used.
    """
    return [
        *_side_warnings("images", images, sample),
        *(_side_warnings("reference", reference.images, real) if real else ()),
        *_network_warnings(network),
        *_score_warnings(sample.count, scores, settings),
        *(_size_warnings(images, reference.images) if real else ()),
    ]


def _side_warnings(side: str, images: ImageSet, extraction: Extraction) -> Iterator[str]:
    for name, moments in extraction.moments.items():
        if extraction.count <= len(moments.sum):
            yield (
                f"{side}: {extraction.count:,} images for {len(moments.sum):,} {name} features; their covariance is "
                "singular and the Frechet distance mostly bias"
            )
    if extraction.distinct < extraction.count:
        copies = extraction.count - extraction.distinct
        yield f"{side}: {copies:,} of {extraction.count:,} images are exact copies of others"
    if images.lossy:
        yield f"{side}: {images.lossy:,} lossily compressed (JPEG) files; compression visibly moves FID"


def _network_warnings(network: FeatureNetwork) -> Iterator[str]:
    if network.name == INCEPTION and not (network.weights_sha256 or "").startswith(PUBLISHED_HASH):
        yield (
            f"the Inception weights are not the published file (SHA-256 {PUBLISHED_HASH}…); scores are comparable only "
            "with others of the same weights"
        )


def _score_warnings(count: int, scores: dict[str, float], settings: dict[str, Any]) -> Iterator[str]:
    if count < FEW_SAMPLES:
        yield (
            f"only {count:,} images: Frechet distances are biased upward by a term of order 1/N; compare them only at "
            "equal counts (published ones use 50,000)"
        )
    if "kid" in settings and settings["kid"]["subset_size"] < KID_SUBSET_SIZE:
        yield f"kernel distance on subsets of {settings['kid']['subset_size']} instead of {KID_SUBSET_SIZE} images"
    if "is_shuffled" in scores and abs(scores["is"] / scores["is_shuffled"] - 1) > 0.02:
        yield (
            f"Inception Score {scores['is']:.4g} in file order, {scores['is_shuffled']:.4g} shuffled: the images seem "
            "to be sorted by class, which lowers it (50,000 sorted images were seen at 62 instead of 298); shuffle them"
        )


def _size_warnings(images: ImageSet, reference: ImageSet) -> Iterator[str]:
    if images.size != reference.size:
        yield f"images are {by_text(images.size)}, reference images {by_text(reference.size)} (height x width)"


def by_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
