"""Evaluation by protocol: which features, splits and distances make a published number, and a record of them all.

``evaluate`` compares two sets of images, ``evaluate_reconstruction`` images with their reconstructions. Both return a
JSON-ready dictionary: the scores, and beside them everything that has to be equal for two scores to be comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.eval import metrics as m
from vistok.eval.features import (
    INCEPTION,
    CallableNetwork,
    Extraction,
    FeatureNetwork,
    InceptionV3Compat,
    extract_features,
    full_precision,
)
from vistok.eval.images import ImageError, ImageSet, open_images
from vistok.eval.reconstruction import SSIM_VARIANTS, decibels, mean_squared_error
from vistok.eval.record import (
    KID_SUBSET_SIZE,
    by_text,
    comparability_warnings,
    describe_images,
    describe_reference,
    library_versions,
    save_result,
)
from vistok.eval.references import Reference, open_reference

METRICS = ("fid", "sfid", "is", "kid", "prc")
SHUFFLE_SEED = KID_SEED = 2020
KID_SUBSETS = 100
NEIGHBOURS = 3


@dataclass(frozen=True)
class Protocol:
    """What a protocol fixes beyond the Inception network, which ``adm`` and ``torch-fidelity`` share.

    Attributes:
        metrics: those it defines.
        splits: of the Inception Score: "chunks" of 5,000 in file order, or "even": 10 of the shuffled rows.
        distance: of precision and recall.
    """

    name: str
    metrics: tuple[str, ...]
    splits: str
    distance: m.Distance


PROTOCOLS = {
    # The TensorFlow suite of guided-diffusion (ADM), whose numbers nearly every paper reports.
    "adm": Protocol("adm", ("fid", "sfid", "is", "prc"), "chunks", "squared_euclidean_float16"),
    # torch-fidelity's command line with feature_extractor="inception-v3-compat".
    "torch-fidelity": Protocol("torch-fidelity", ("fid", "is", "kid", "prc"), "even", "euclidean"),
}
# Another network than Inception: the same arithmetic on its features, under names that cannot be mistaken for FID.
CUSTOM = Protocol("custom-network", ("fid", "kid", "prc"), "even", "euclidean")
ADM_SPLIT_SIZE, FIDELITY_SPLITS = 5000, 10


@dataclass(frozen=True)
class _Sides:
    """Both sides of a comparison, as far as the wanted metrics need them."""

    protocol: Protocol
    sample: Extraction
    real: Extraction | None
    real_gaussians: dict[str, m.Gaussian]
    device: torch.device

    def pools(self) -> tuple[Tensor, Tensor]:
        """Pooled features of samples and of reference images, (N, D) each."""
        return self.sample.features["pool"].to(self.device), self.real.features["pool"].to(self.device)


def evaluate(
    images: str | Path | Tensor | ImageSet,
    reference: str | Path | Tensor | ImageSet | Reference,
    *,
    protocol: str = "torch-fidelity",
    metrics: Sequence[str] | None = None,
    weights: str | Path | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    network: str | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score a set of images against a reference.

    Args:
        images: a folder, an ADM-style .npz, a run folder or a tensor; see ``vistok.eval.images.open_images``.
        reference: the same, or an .npz with moments (``mu``, ``sigma``, and ``mu_s``, ``sigma_s`` for sFID). As in the
            ADM suite, stored moments serve the Frechet distances, and its images precision and recall.
        protocol: "adm" (FID, sFID, Inception Score in file order, precision, recall) or "torch-fidelity" (FID, shuffled
            Inception Score, KID, precision, recall).
        metrics: some of "fid", "sfid", "is", "kid", "prc"; by default all that protocol and reference allow.
        weights: file with the Inception weights; downloaded once if None.
        features: another network in place of Inception: uint8 (B, 3, H, W) -> (B, D). Its scores are called
            ``frechet_distance`` and ``kernel_distance``, never FID or KID.
        network: the name of that other network, required with ``features``.
        batch_size: images per forward pass.
        device: where to compute; a GPU if there is one by default.
        out: folder in which ``result.json`` is written.

    Returns:
        ``protocol``, ``scores``, ``images``, ``reference``, ``network``, ``settings``, ``versions``, ``warnings``.

    Raises:
        ImageError, InvalidReferenceError: a side that cannot be read, or a reference made by another network.
        CheckpointError: weights that are absent, damaged or out of reach.
        ValueError: an unknown protocol or metric, a metric that the reference does not allow, or too few images.
    """
    rules = _rules(protocol, features, network)
    if features is not None and weights is not None:
        raise ValueError("weights are those of Inception; with features=, the function brings its own")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images, reference = open_images(images), open_reference(reference)
    wanted, skipped = _choose_metrics(metrics, rules, reference)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = CallableNetwork(features, network) if features else InceptionV3Compat.load(weights, device=device)
    reference.check_network(net, net(next(iter(images.batches(1)))))

    sides = _extract(rules, images, reference, net, wanted, batch_size, device)
    scores: dict[str, float] = {}
    with full_precision():
        for metric in wanted:
            scores |= _SCORERS[metric](sides)
    if features:
        scores = {_neutral_name(name): value for name, value in scores.items()}
    settings = _settings(wanted, sides)
    result = {
        "protocol": rules.name,
        "scores": scores,
        "images": describe_images(images, sides.sample),
        "reference": describe_reference(reference, sides.real),
        "network": {"name": net.name, "weights_sha256": net.weights_sha256, "dtype": "float32", "tf32": False},
        "settings": {"batch_size": batch_size, "device": device.type} | settings,
        "versions": library_versions(),
        "warnings": skipped
        + comparability_warnings(images, reference, net, sides.sample, sides.real, scores, settings),
    }
    if out is not None:
        save_result(result, out)
    return result


def evaluate_reconstruction(
    originals: str | Path | Tensor | ImageSet,
    reconstructions: str | Path | Tensor | ImageSet,
    *,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score reconstructions against their originals, pair by pair, on 8-bit images as papers do.

    Args:
        originals, reconstructions: as for ``evaluate``; equally many of one size, in the same order.
        lpips: a distance (B,) of two batches in [-1, 1], such as ``vistok.losses.LPIPS.from_pretrained()``, on
            ``device``. Distances of other networks than VGG16 are not comparable.
        batch_size: pairs at a time.
        device: where to compute.
        out: folder in which ``result.json`` is written.

    Returns:
        As ``evaluate``. ``psnr`` is the mean over images of their decibels, ``psnr_of_mean_mse`` the decibels of the
        mean error (never higher); each SSIM carries its variant's name (``SSIM_VARIANTS``; those whose window fits
        into the images); ``lpips`` is the mean over images. A PSNR that is infinite, because images are equal, is None.

    Raises:
        ImageError: sets that cannot be read, or that do not pair up.
    """
    originals, reconstructions = open_images(originals), open_images(reconstructions)
    _check_pairs(originals, reconstructions)
    per_image: dict[str, list[Tensor]] = {}
    for original, reconstruction in zip(originals.batches(batch_size), reconstructions.batches(batch_size)):
        pair = (original.to(device), reconstruction.to(device))
        for name, values in _score_pairs(*pair, lpips).items():
            per_image.setdefault(name, []).append(values.double().cpu())
    columns = {name: torch.cat(values) for name, values in per_image.items()}
    mse = columns.pop("mse")
    psnr = {"psnr": decibels(mse).mean(), "psnr_of_mean_mse": decibels(mse.mean())}
    scores = {name: float(value) if value.isfinite() else None for name, value in psnr.items()}
    scores |= {name: float(values.mean()) for name, values in columns.items()}
    result = {
        "protocol": "reconstruction",
        "scores": scores,
        "images": describe_images(reconstructions),
        "reference": describe_images(originals),
        "settings": _reconstruction_settings(scores, lpips),
        "versions": library_versions(),
        "warnings": _reconstruction_warnings(originals, reconstructions, equal=int((mse == 0).sum())),
    }
    if out is not None:
        save_result(result, out)
    return result


def _reconstruction_settings(scores: dict[str, Any], lpips: Callable | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"psnr": {"pixels": "uint8 / 255", "data_range": 1.0}}
    used = {name: variant for name, variant in SSIM_VARIANTS.items() if name in scores}
    settings |= {name: {"pixels": "uint8 / 255"} | asdict(variant) for name, variant in used.items()}
    if lpips is not None:
        settings["lpips"] = {"pixels": "uint8 / 127.5 - 1", "network": _name_of(lpips)}
    return settings


@torch.no_grad()
def _score_pairs(original: Tensor, reconstruction: Tensor, lpips: Callable | None) -> dict[str, Tensor]:
    """Squared error, SSIM variants and LPIPS of uint8 pairs (B, 3, H, W), (B,) each."""
    x, y = original.double() / 255, reconstruction.double() / 255
    scores = {"mse": mean_squared_error(x, y)}
    for name, variant in SSIM_VARIANTS.items():
        if min(x.shape[-2:]) >= variant.window_size:
            scores[name] = variant(x, y)
    if lpips is not None:
        scores["lpips"] = lpips(reconstruction.float() / 127.5 - 1, original.float() / 127.5 - 1)
    return scores


def _check_pairs(originals: ImageSet, reconstructions: ImageSet) -> None:
    if originals.count != reconstructions.count:
        raise ImageError(
            f"{originals.source} has {originals.count} originals, {reconstructions.source} {reconstructions.count} "
            "reconstructions; they are compared pair by pair"
        )
    if originals.size != reconstructions.size:
        raise ImageError(
            f"originals are {by_text(originals.size)} (height x width), reconstructions "
            f"{by_text(reconstructions.size)}; crop the originals as the tokenizer's input was cropped"
        )


def _reconstruction_warnings(originals: ImageSet, reconstructions: ImageSet, *, equal: int) -> list[str]:
    found = []
    if equal:
        found.append(f"{equal} of {originals.count} reconstructions equal their originals; their PSNR is infinite")
    if None not in (originals.names, reconstructions.names) and originals.names != reconstructions.names:
        pairs = zip(originals.names, reconstructions.names)
        first = next(pair for pair in pairs if pair[0] != pair[1])
        found.append(f"file names differ, paired by order: {first[0]!r} with {first[1]!r}; is each with its original?")
    if reconstructions.lossy:
        found.append(f"{reconstructions.lossy} reconstructions are lossily compressed (JPEG) files")
    return found


def _name_of(distance: Callable) -> str:
    from vistok.losses import LPIPS

    return "vgg16" if isinstance(distance, LPIPS) else type(distance).__name__


def _rules(protocol: str, features: Callable | None, network: str | None) -> Protocol:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if (features is None) != (network is None):
        raise ValueError("features and network belong together: the network's name goes into the record of its scores")
    if features is None:
        return PROTOCOLS[protocol]
    if network == INCEPTION:
        raise ValueError(f"{INCEPTION!r} is the name of the Inception network; give your own network another one")
    if protocol == "adm":
        raise ValueError(f"the protocol 'adm' fixes its network, {INCEPTION}; it cannot be used with {network!r}")
    return CUSTOM


def _choose_metrics(
    metrics: Sequence[str] | None, rules: Protocol, reference: Reference
) -> tuple[list[str], list[str]]:
    """The metrics to compute, in canonical order, and a warning for each that the reference rules out."""
    for metric in metrics or ():
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        if metric not in rules.metrics:
            defined = ", ".join(rules.metrics)
            raise ValueError(f"the protocol {rules.name!r} does not define {metric!r}; it has {defined}")
    wanted, skipped = [], []
    for metric in rules.metrics if metrics is None else [name for name in METRICS if name in metrics]:
        obstacle = _obstacle(metric, reference)
        if obstacle is None:
            wanted.append(metric)
        elif metrics is None:
            skipped.append(f"no {metric}: {obstacle}")
        else:
            raise ValueError(f"{metric} cannot be computed: {obstacle}")
    return wanted, skipped


def _obstacle(metric: str, reference: Reference) -> str | None:
    if metric in ("kid", "prc") and reference.images is None:
        return f"the reference {reference.source} holds moments but no images"
    if metric == "sfid" and reference.gaussians and "spatial" not in reference.gaussians:
        return f"the reference {reference.source} has no spatial moments ('mu_s', 'sigma_s')"
    if metric == "fid" and reference.gaussians and "pool" not in reference.gaussians:
        return f"the reference {reference.source} has no moments 'mu', 'sigma'"
    return None


_MOMENTS_OF = {"fid": "pool", "sfid": "spatial"}
_ROWS_OF = {"is": "logits", "kid": "pool", "prc": "pool"}


def _extract(
    rules: Protocol,
    images: ImageSet,
    reference: Reference,
    network: FeatureNetwork,
    wanted: list[str],
    batch_size: int,
    device: torch.device,
) -> _Sides:
    """One pass of the network over each side; none over a reference whose stored moments suffice."""
    moments = tuple(_MOMENTS_OF[metric] for metric in wanted if metric in _MOMENTS_OF)
    rows = tuple(dict.fromkeys(_ROWS_OF[metric] for metric in wanted if metric in _ROWS_OF))
    sample = extract_features(images, network, keep=rows, moments=moments, batch_size=batch_size)
    real_rows = tuple(name for name in rows if name == "pool")
    real_moments = () if reference.gaussians else moments
    real = None
    if real_rows or real_moments:
        real = extract_features(reference.images, network, keep=real_rows, moments=real_moments, batch_size=batch_size)
    gaussians = reference.gaussians
    if real_moments:
        gaussians = {name: running.gaussian for name, running in real.moments.items()}
    return _Sides(rules, sample, real, gaussians, device)


def _frechet(sides: _Sides, feature: str) -> float:
    real = sides.real_gaussians[feature]
    sample = sides.sample.moments[feature].gaussian
    return m.frechet_distance(sample, m.Gaussian(*(moment.to(sample.mean.device) for moment in real)))


def _score_is(sides: _Sides) -> dict[str, float]:
    logits = sides.sample.features["logits"]
    if sides.protocol.splits == "even":
        score = m.inception_score(m.shuffled(logits, SHUFFLE_SEED), m.split_evenly(len(logits), FIDELITY_SPLITS))
        return {"is": score.mean, "is_std": score.std}
    splits = m.split_into_chunks(len(logits), ADM_SPLIT_SIZE)
    return {
        "is": m.inception_score(logits, splits).mean,
        "is_shuffled": m.inception_score(m.shuffled(logits, SHUFFLE_SEED), splits).mean,
    }


def _score_kid(sides: _Sides) -> dict[str, float]:
    generated, real = sides.sample.features["pool"], sides.real.features["pool"]
    score = m.kernel_distance(generated, real, subsets=KID_SUBSETS, subset_size=_kid_subset_size(sides), seed=KID_SEED)
    return {"kid": score.mean, "kid_std": score.std}


def _kid_subset_size(sides: _Sides) -> int:
    return min(KID_SUBSET_SIZE, sides.sample.count, sides.real.count)


def _score_prc(sides: _Sides) -> dict[str, float]:
    score = m.precision_recall(*sides.pools(), neighbours=NEIGHBOURS, distance=sides.protocol.distance)
    return {"precision": score.precision, "recall": score.recall, "f_score": score.f_score}


_SCORERS: dict[str, Callable[[_Sides], dict[str, float]]] = {
    "fid": lambda sides: {"fid": _frechet(sides, "pool")},
    "sfid": lambda sides: {"sfid": _frechet(sides, "spatial")},
    "is": _score_is,
    "kid": _score_kid,
    "prc": _score_prc,
}
_NEUTRAL_NAMES = {"fid": "frechet_distance", "kid": "kernel_distance", "kid_std": "kernel_distance_std"}


def _neutral_name(score: str) -> str:
    return _NEUTRAL_NAMES.get(score, score)


def _settings(wanted: list[str], sides: _Sides) -> dict[str, Any]:
    """What the protocol fixed for each metric."""
    settings: dict[str, Any] = {}
    if "is" in wanted and sides.protocol.splits == "even":
        settings["is"] = {"splits": FIDELITY_SPLITS, "order": "shuffled", "seed": SHUFFLE_SEED}
    elif "is" in wanted:
        settings["is"] = {"split_size": ADM_SPLIT_SIZE, "order": "file", "shuffle_seed": SHUFFLE_SEED}
    if "kid" in wanted:
        kernel = m.PolynomialKernel()._asdict()
        size = _kid_subset_size(sides)
        settings["kid"] = {"subsets": KID_SUBSETS, "subset_size": size, "seed": KID_SEED, "kernel": kernel}
    if "prc" in wanted:
        settings["prc"] = {"neighbours": NEIGHBOURS, "distance": sides.protocol.distance}
    return settings
