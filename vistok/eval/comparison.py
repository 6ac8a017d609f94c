"""``evaluate``: compare two sets of images, or stored statistics of them, by a protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.eval.guards import comparability_warnings
from vistok.eval.images import ImageSet
from vistok.eval.networks import FeatureNetwork
from vistok.eval.pairs import evaluate_reconstruction
from vistok.eval.protocols import ImageProtocol, choose_protocol, load_network
from vistok.eval.record import check_result_folder, describe_side, library_versions, save_result
from vistok.eval.references import Reference, open_reference
from vistok.eval.scoring import Scores, Side, choose_metrics, compute_scores, describe_metrics, extract_side
from vistok.utils.devices import choose_device
from vistok.utils.numbers import check_whole
from vistok.utils.processes import ALONE, Processes

Source = str | Path | Sequence[str | Path] | Tensor | ImageSet | Reference


def evaluate(
    images: Source,
    reference: Source,
    *,
    protocol: str = "torch-fidelity",
    metrics: Sequence[str] | None = None,
    weights: str | Path | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    network: str | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    crop: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    processes: Processes = ALONE,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score a set of images against a reference.

    Args:
        images: a folder, an ADM-style .npz, webdataset shards, a run folder, a tensor (see
            ``vistok.eval.images.open_images``), or an .npz with moments (``mu``, ``sigma``; for sFID ``mu_s``,
            ``sigma_s``). As in the ADM suite, Frechet distances use stored moments if there are any, and the other
            scores use the images.
        reference: the real images, in the same forms.
        protocol: "adm" (FID, sFID, Inception Score in file order, precision, recall), "torch-fidelity" (FID, shuffled
            Inception Score, KID, precision, recall), "clean-fid" (FID, KID), "dinov2" (FD-DINOv2, precision, recall) or
            "reconstruction" (rFID, PSNR, SSIM, LPIPS; ``images`` are reconstructions of ``reference``, in its order).
        metrics: some of "fid", "sfid", "is", "kid", "prc"; by default all that the protocol and both sides allow. For
            "reconstruction", ["fid"] leaves the scores of pairs out.
        weights: file with the network's weights; downloaded once if None.
        features: another network in place of the protocol's: uint8 (B, 3, H, W) -> (B, D). Its scores are called
            ``frechet_distance`` and ``kernel_distance``, never FID or KID.
        network: the name of that other network, required with ``features``.
        lpips: for the pairs of "reconstruction", see ``evaluate_reconstruction``.
        crop: side in pixels; the reference's files are resized and cropped to it by ADM's centre crop.
        batch_size: images read at a time; no score depends on it (see ``vistok.eval.batches``).
        device: where to compute; by default a GPU if there is one.
        processes: the processes that share the work; all of them return the result, the first one writes it.
        out: folder in which ``result.json`` is written.

    Returns:
        ``protocol``, ``scores``, ``images``, ``reference``, ``network``, ``settings``, ``versions``, ``warnings``.

    Raises:
        ImageError, InvalidReferenceError: a side cannot be read, or the reference does not fit.
        CheckpointError: the weights are absent or damaged, or cannot be downloaded.
        ValueError: the protocol or a metric is unknown, a side does not allow a metric, there are too few images, or
            ``lpips`` is given where no pairs are scored.
    """
    rules = choose_protocol(protocol, features, network)
    check_whole("batch_size", batch_size, least=1)
    sample = open_reference(images, reading=rules.reading)
    check_result_folder(out)
    real = open_reference(reference, crop=crop, reading=rules.reading)
    paired = protocol == "reconstruction"
    if paired:
        real.check_held_out()
    if lpips is not None and (not paired or metrics is not None):
        raise ValueError(
            "LPIPS compares images with their reconstructions: leave lpips out (command line: --lpips-weights), or "
            "take the protocol 'reconstruction' without metrics"
        )
    wanted, skipped = choose_metrics(metrics, rules, sample, real)
    device = choose_device(processes.device() if device is None else device)
    net: FeatureNetwork
    if sample.images is None and real.images is None:
        net = StoredFeatures.of(rules, real)
    else:
        net = load_network(rules, weights=weights, features=features, network=network, device=device)
    if paired and metrics is None and sample.images is not None and real.images is not None:
        return evaluate_reconstruction(
            real.images,
            sample.images,
            network=net,
            lpips=lpips,
            crop=crop,
            batch_size=batch_size,
            device=device,
            processes=processes,
            out=out,
        )
    if paired and metrics is None:
        skipped.append("no PSNR, SSIM and LPIPS: they compare pairs of images, and one side holds moments only")
    _check_networks(net, sample, real)
    options: dict[str, Any] = {"batch_size": batch_size, "processes": processes}
    sample_side, real_side = (
        extract_side(sample, net, wanted, is_sample=True, **options),
        extract_side(real, net, wanted, is_sample=False, **options),
    )
    result, _ = score_sides(rules, net, wanted, sample_side, real_side, device=device)
    result["warnings"] = skipped + result["warnings"]
    result["settings"] |= {"batch_size": batch_size, "device": device.type, "processes": processes.count, "crop": crop}
    if out is not None and processes.is_first:
        save_result(result, out)
    return result


def score_sides(
    protocol: ImageProtocol,
    network: FeatureNetwork,
    metrics: Sequence[str],
    sample: Side,
    real: Side,
    *,
    device: torch.device,
) -> tuple[dict[str, Any], Scores]:
    """The result of ``evaluate`` for two sides whose features were extracted, and the plain scores in it."""
    scores = compute_scores(protocol, metrics, sample, real, device)
    settings = describe_metrics(protocol, metrics, sample, real)
    result = {
        "protocol": protocol.name,
        "scores": protocol.rename(scores.values),
        "images": describe_side(sample),
        "reference": describe_side(real),
        "network": protocol.describe(network),
        "settings": settings,
        "versions": library_versions(),
        "warnings": comparability_warnings(protocol, network, sample, real, scores.values, settings),
    }
    return result, scores


@dataclass(frozen=True)
class StoredFeatures:
    """Name, resize rule and weights of the network, when both sides hold stored moments and no network has to run."""

    name: str
    resize: str
    weights_sha256: str | None

    @classmethod
    def of(cls, protocol: ImageProtocol, reference: Reference) -> StoredFeatures:
        """The network that the reference file records; where it records nothing, the protocol's."""
        recorded = reference.provenance
        return cls(
            recorded.network or protocol.network or "unknown",
            recorded.resize or protocol.resize or "unknown",
            recorded.weights_sha256,
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("no network was loaded, because both sides hold stored moments")


def _check_networks(network: FeatureNetwork, *sides: Reference) -> None:
    """Refuse stored features of another network before any long work."""
    images = next((side.images for side in sides if side.images is not None), None)
    features = {} if images is None else network(next(iter(images.batches(1))))
    for side in sides:
        side.check_network(network, features)
