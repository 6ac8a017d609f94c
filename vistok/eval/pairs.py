"""``evaluate_reconstruction``: compare images with their reconstructions, pair by pair and as two sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.eval.features import FeaturePass, gathered
from vistok.eval.guards import by_text, comparability_warnings, file_warnings, lossy_warnings, range_warnings
from vistok.eval.images import ImageError, ImageSet, open_images
from vistok.eval.networks import CallableNetwork, FeatureNetwork
from vistok.eval.protocols import CUSTOM, PROTOCOLS, ImageProtocol
from vistok.eval.reconstruction import SSIM_VARIANTS, decibels, mean_squared_error
from vistok.eval.record import check_result_folder, describe_images, describe_side, library_versions, save_result
from vistok.eval.references import Reference
from vistok.eval.scoring import Side, compute_scores
from vistok.utils.devices import choose_device
from vistok.utils.processes import ALONE, Processes

FEWEST_OTHERS, DOUBTFUL = 3, 0.5
"""Reconstructions are doubted if their mean error is at least ``DOUBTFUL`` times the error against other originals,
measured on at least ``FEWEST_OTHERS`` pairs."""

Source = str | Path | Sequence[str | Path] | Tensor | ImageSet


def evaluate_reconstruction(
    originals: Source,
    reconstructions: Source,
    *,
    network: FeatureNetwork | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    crop: int | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    processes: Processes = ALONE,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score reconstructions against their originals on 8-bit images, as papers do; the images are read once.

    Args:
        originals, reconstructions: see ``vistok.eval.images.open_images``; of equal number and size, in the same order.
        network: for rFID, the Frechet distance of the two sets; None computes no rFID.
        lpips: a distance (B,) of two batches in [-1, 1], such as ``vistok.losses.LPIPS.from_pretrained()``. A
            module is moved to ``device``. Only distances of VGG16 are comparable with published ones.
        crop: side in pixels; the originals' files are resized and cropped to it by ADM's centre crop.
        batch_size: pairs read at a time; no score depends on it.
        device: where to compute.
        processes: the processes that share the work; all of them return the result, the first one writes it.
        out: folder in which ``result.json`` is written.

    Returns:
        As ``evaluate``, with these scores:

        - ``rfid``, or ``frechet_distance`` with a network of the user's own;
        - ``psnr``, the mean of the images' PSNRs, and ``psnr_of_mean_mse``, the PSNR of the mean error (never higher);
          None if it is infinite, because images are equal;
        - every variant of ``SSIM_VARIANTS`` whose window fits into the images, by its name;
        - ``lpips``, the mean over images.

    Raises:
        ImageError: the sets cannot be read, or do not pair up.
    """
    check_result_folder(out)
    device = choose_device(device)
    if isinstance(lpips, torch.nn.Module):
        lpips = lpips.to(device)
    originals, reconstructions = open_images(originals, crop=crop), open_images(reconstructions)
    _check_pairs(originals, reconstructions)
    if network is not None and originals.count < 2:
        raise ImageError(f"rFID needs at least 2 images, and {originals.source} has {originals.count}; leave it out")
    passes = _Passes(network, originals, reconstructions) if network is not None else None
    columns = _pass_over_pairs(originals, reconstructions, passes, lpips, batch_size, device, processes)
    mse, others = columns.pop("mse"), columns.pop("mse_of_others")
    psnr = {"psnr": decibels(mse).mean(), "psnr_of_mean_mse": decibels(mse.mean())}
    scores = {name: float(value) if value.isfinite() else None for name, value in psnr.items()}
    scores |= {name: float(values.mean()) for name, values in columns.items()}
    warnings = _pair_warnings(originals, reconstructions, equal=int((mse == 0).sum()))
    warnings += _doubts(reconstructions, mse, others)
    settings = {"batch_size": batch_size, "device": device.type, "processes": processes.count, "crop": crop}
    result: dict[str, Any] = {
        "protocol": "reconstruction",
        "scores": scores,
        "images": describe_images(reconstructions),
        "reference": describe_images(originals),
        "settings": _settings(scores, lpips) | settings,
        "versions": library_versions(),
        "warnings": warnings,
    }
    if passes is not None:
        passes.add_to(result, processes, device)
    if out is not None and processes.is_first:
        save_result(result, out)
    return result


class _Passes:
    """The feature passes of rFID over both sets."""

    def __init__(self, network: FeatureNetwork, originals: ImageSet, reconstructions: ImageSet) -> None:
        self.network = network
        self.sets = (reconstructions, originals)
        self.passes = [FeaturePass(network, images.source, moments=["pool"]) for images in self.sets]

    def add(self, original: Tensor, reconstruction: Tensor) -> None:
        for features, images in zip(self.passes, (reconstruction, original)):
            features.add(images)

    def add_to(self, result: dict[str, Any], processes: Processes, device: torch.device) -> None:
        """Put the Frechet distance, what it depends on and its warnings into ``result``."""
        protocol = _protocol_of(self.network)
        sample, real = (
            Side(Reference(images.source, images), gathered(features, processes))
            for images, features in zip(self.sets, self.passes)
        )
        scores = compute_scores(protocol, ["fid"], sample, real, device).values
        result["scores"] = protocol.rename(scores) | result["scores"]
        result["images"], result["reference"] = describe_side(sample), describe_side(real)
        result["network"] = protocol.describe(self.network)
        others = comparability_warnings(protocol, self.network, sample, real, scores, {})
        result["warnings"] += [warning for warning in others if warning not in result["warnings"]]


def _protocol_of(network: FeatureNetwork) -> ImageProtocol:
    return CUSTOM if isinstance(network, CallableNetwork) else PROTOCOLS["reconstruction"]


def _pass_over_pairs(
    originals: ImageSet,
    reconstructions: ImageSet,
    passes: _Passes | None,
    lpips: Callable | None,
    batch_size: int,
    device: torch.device,
    processes: Processes,
) -> dict[str, Tensor]:
    """Scores of all pairs by name, (N,) float64 each, in order; features go to ``passes``."""
    if processes.count > originals.count:
        raise ImageError(f"{processes.count} processes share only {originals.count} images; use fewer")
    part = processes.part(originals.count) if processes.count > 1 else ()
    per_image: dict[str, list[Tensor]] = {"mse_of_others": [torch.empty(0, dtype=torch.float64)]}
    before = None
    for original, reconstruction in zip(
        originals.batches(batch_size, *part), reconstructions.batches(batch_size, *part)
    ):
        for name, values in _score_pairs(original.to(device), reconstruction.to(device), lpips).items():
            per_image.setdefault(name, []).append(values.double().cpu())
        per_image["mse_of_others"].append(_errors_of_others(original, reconstruction, before))
        before = reconstruction[-1:]
        if passes is not None:
            passes.add(original, reconstruction)
    gathered = processes.gather({name: torch.cat(values) for name, values in per_image.items()})
    return {name: torch.cat([columns[name] for columns in gathered]) for name in gathered[0]}


def _errors_of_others(original: Tensor, reconstruction: Tensor, before: Tensor | None) -> Tensor:
    """Mean squared error of each reconstruction against the original that follows its own.

    Args:
        before: the last reconstruction (1, C, H, W) of the previous batch; None in the first batch.

    Returns:
        (B,), or (B - 1,) in the first batch.
    """
    shifted = reconstruction[:-1] if before is None else torch.cat([before, reconstruction[:-1]])
    x, y = original[len(original) - len(shifted) :].double() / 255, shifted.double() / 255
    return mean_squared_error(x, y)


@torch.no_grad()
def _score_pairs(original: Tensor, reconstruction: Tensor, lpips: Callable | None) -> dict[str, Tensor]:
    """Mean squared error, SSIM variants and LPIPS, (B,) each, of uint8 pairs (B, 3, H, W)."""
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
            f"{by_text(reconstructions.size)}; crop the originals as the tokenizer's input was cropped (crop=SIZE, on "
            "the command line --crop SIZE)"
        )


def _pair_warnings(originals: ImageSet, reconstructions: ImageSet, *, equal: int) -> list[str]:
    found: list[str] = []
    for name, images in (("images", reconstructions), ("reference", originals)):
        if images.files_read is not None:
            found += file_warnings(name, images.files_read)
        found += range_warnings(name, images)
    if equal:
        found.append(f"{equal} of {originals.count} reconstructions equal their originals; their PSNR is infinite")
    ours, theirs = originals.names, reconstructions.names
    if ours is not None and theirs is not None and ours != theirs:
        pairs = zip(ours, theirs)
        first = next(pair for pair in pairs if pair[0] != pair[1])
        found.append(f"file names differ, paired by order: {first[0]!r} with {first[1]!r}; is each with its original?")
    return [*found, *lossy_warnings("images", reconstructions.lossy)]


def _doubts(reconstructions: ImageSet, mse: Tensor, others: Tensor) -> list[str]:
    """A warning if reconstructions are hardly nearer to their own originals than to others: they may be mispaired."""
    if reconstructions.files_read is None or len(others) < FEWEST_OTHERS or not mse.any():
        return []
    if mse.mean() < DOUBTFUL * others.mean():
        return []
    return [
        f"are these reconstructions of these images, in this order? Their PSNR is {decibels(mse.mean()):.2f} dB, and "
        f"{decibels(others.mean()):.2f} dB if each is compared with the original after its own"
    ]


def _settings(scores: dict[str, Any], lpips: Callable | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"psnr": {"pixels": "uint8 / 255", "data_range": 1.0}}
    used = {name: variant for name, variant in SSIM_VARIANTS.items() if name in scores}
    settings |= {name: {"pixels": "uint8 / 255"} | asdict(variant) for name, variant in used.items()}
    if lpips is not None:
        settings["lpips"] = {"pixels": "uint8 / 127.5 - 1", "network": _name_of(lpips)}
    return settings


def _name_of(distance: Callable) -> str:
    from vistok.losses import LPIPS

    return "vgg16" if isinstance(distance, LPIPS) else type(distance).__name__
