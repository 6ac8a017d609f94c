"""Warnings beside a score: what makes it incomparable with published scores, and by how much if that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vistok.eval.dinov2 import DINOV2
from vistok.eval.images import FilesRead, ImageSet, TensorImages
from vistok.eval.networks import INCEPTION, PUBLISHED_HASH, FeatureNetwork
from vistok.eval.protocols import ImageProtocol
from vistok.eval.references import HELD_OUT, WRONG_REFERENCE
from vistok.eval.scoring import KID_SUBSET_SIZE, Side

FEW_SAMPLES = 10_000


def comparability_warnings(
    protocol: ImageProtocol,
    network: FeatureNetwork,
    sample: Side,
    real: Side,
    scores: dict[str, float],
    settings: dict[str, Any],
) -> list[str]:
    """All warnings about the scores of ``sample`` against ``real``.

    Args:
        scores: by their plain names ("fid", "is").
        settings: see ``vistok.eval.scoring.describe_metrics``.
    """
    return [
        *_side_warnings("images", sample),
        *_side_warnings("reference", real),
        *_pair_warnings(protocol, sample, real),
        *_network_warnings(protocol, network),
        *_score_warnings(scores, settings),
    ]


def _side_warnings(name: str, side: Side) -> Iterator[str]:
    yield from count_warnings(name, side.count, _widths(side))
    extraction = side.extraction
    if extraction is not None and extraction.distinct < extraction.count:
        copies = extraction.count - extraction.distinct
        yield (
            f"{name}: {copies:,} of {extraction.count:,} images are exact copies of others; one seed for every batch "
            "or process does that (a published model was seen at FID 4.24 that way)"
        )
    images = side.reference.images
    if images is not None and images.files_read is not None:
        yield from file_warnings(name, images.files_read)
    if images is not None:
        yield from lossy_warnings(name, images.lossy)
        yield from range_warnings(name, images)


def lossy_warnings(name: str, lossy: int) -> Iterator[str]:
    if lossy:
        yield (
            f"{name}: {lossy:,} lossily compressed (JPEG) files; compression and a missing crop move scores (D-AR's "
            "rFID: 2.2 instead of 1.5 against the raw JPEGs of ImageNet); store PNG or .npz"
        )


def range_warnings(name: str, images: ImageSet) -> Iterator[str]:
    """A warning if float pixels seem to be in another range than [-1, 1]."""
    if isinstance(images, TensorImages) and images.doubtful is not None:
        low, high = images.doubtful
        yield (
            f"{name}: float pixels are read as [-1, 1], where 0 is middle grey, and these go from {low:.3g} to "
            f"{high:.3g}; pass 2 x - 1 if they are in [0, 1], and uint8 if in 0..255"
        )


def file_warnings(name: str, read: FilesRead) -> Iterator[str]:
    """Warnings about files that were left out, splits that were read together, and file properties that are ignored."""
    if read.left_out.count:
        yield f"{name}: {read.left_out}"
    if read.splits is not None:
        where = f"{read.splits.rstrip('/')} is" if read.splits else "the images are"
        yield f"{name}: {where} divided into splits, and all of them are read; name the folder of one, such as …/val"
    if read.reading == "raw" and (read.turned or read.transparent):
        yield (
            f"{name}: {read.turned:,} files ask to be turned (EXIF) and {read.transparent:,} are transparent; this "
            "protocol ignores both, as the suite that it follows does"
        )


def _widths(side: Side) -> dict[str, int]:
    """The widths D of the features behind the Frechet distances of a side, by name."""
    widths = {feature: len(gaussian.mean) for feature, gaussian in side.reference.gaussians.items()}
    if not widths and side.extraction is not None:
        widths = {feature: len(moments.sum) for feature, moments in side.extraction.moments.items()}
    return widths


def count_warnings(name: str, count: int | None, widths: Mapping[str, int]) -> Iterator[str]:
    """Warnings that there are too few images for Frechet distances.

    Args:
        name: what the side is called in the warning.
        widths: widths D of the features by name.
    """
    if count is None:
        return
    if count < FEW_SAMPLES:
        yield (
            f"{name}: only {count:,} images: Frechet distances are biased upward by a term of order 1/N; compare "
            "them only at equal counts (published ones use 50,000), or use the kernel distance, which is unbiased"
        )
    yield from singular_warnings(name, count, widths, "images")


def singular_warnings(name: str, count: int, widths: Mapping[str, int], what: str) -> Iterator[str]:
    """A warning if ``count`` samples do not determine the covariance of features of the ``widths`` D.

    Args:
        what: "images" or "clips".
    """
    beyond = [f"{width:,} {feature} features" for feature, width in widths.items() if count <= width]
    if beyond:
        yield (
            f"{name}: {count:,} {what} for {' and '.join(beyond)}: the covariance is singular and the Frechet "
            "distance mostly bias"
        )


def _pair_warnings(protocol: ImageProtocol, sample: Side, real: Side) -> Iterator[str]:
    sizes = [_size(sample), _size(real)]
    if None not in sizes and sizes[0] != sizes[1]:
        yield (
            f"images are {sizes[0]}, reference images {sizes[1]} (height x width); a second resize moves FID (its rule "
            "alone did: 2.11 instead of 2.19 for one published tokenizer), so generate, or crop the "
            "reference, at one size"
        )
    if sample.extraction is not None and _fingerprint(real) == sample.extraction.fingerprint:
        yield "the images and the reference are the same images"
    if protocol.name != "reconstruction" and real.reference.provenance.split in HELD_OUT:
        yield f"the reference is of the split {real.reference.provenance.split!r}: {WRONG_REFERENCE}"


def _size(side: Side) -> str | None:
    if side.extraction is not None:
        return by_text(side.extraction.size)
    if side.reference.images is not None:
        return by_text(side.reference.images.size)
    return side.reference.provenance.image_size


def _fingerprint(side: Side) -> str | None:
    own = None if side.extraction is None else side.extraction.fingerprint
    return side.reference.provenance.fingerprint or own


def _network_warnings(protocol: ImageProtocol, network: FeatureNetwork) -> Iterator[str]:
    if network.name == INCEPTION and not (network.weights_sha256 or "").startswith(PUBLISHED_HASH):
        yield (
            f"the Inception weights are not the published file (SHA-256 {PUBLISHED_HASH}…); scores are comparable only "
            "with others of the same weights"
        )
    if protocol.network == DINOV2 and network.name != DINOV2:
        yield f"FD-DINOv2 is defined with {DINOV2}, these are weights of {network.name}; its values are others"


def _score_warnings(scores: dict[str, float], settings: dict[str, Any]) -> Iterator[str]:
    if "kid" in settings and settings["kid"]["subset_size"] < KID_SUBSET_SIZE:
        yield f"kernel distance on subsets of {settings['kid']['subset_size']} instead of {KID_SUBSET_SIZE} images"
    if "is_shuffled" in scores and abs(scores["is"] / scores["is_shuffled"] - 1) > 0.02:
        yield (
            f"Inception Score {scores['is']:.4g} in file order, {scores['is_shuffled']:.4g} shuffled: the images seem "
            "to be sorted by class, which lowers it (50,000 sorted images were seen at 62 instead of 298); shuffle them"
        )


def by_text(size: tuple[int, int]) -> str:
    """(H, W) as "HxW"."""
    return f"{size[0]}x{size[1]}"
