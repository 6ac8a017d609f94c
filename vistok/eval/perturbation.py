"""pFID: the Frechet distance of reconstructions from perturbed tokens, which imitate the errors of a generator.

Qiu et al., "Robust Latent Matters" (arXiv 2503.08354) and "Image Tokenizer Needs Post-Training" (arXiv 2509.12474).
Their code for pFID was never released, and the published grid of rates and strengths is unconfirmed. So the grid is a
setting here and recorded with every number, and no number is claimed to equal a published pFID.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.data.config import DataConfig
from vistok.draws import Keys
from vistok.eval import metrics as m
from vistok.eval.batches import NETWORK_BATCH, filled
from vistok.eval.features import FeaturePass, gathered
from vistok.eval.guards import count_warnings
from vistok.eval.networks import CallableNetwork, FeatureNetwork, full_precision
from vistok.eval.protocols import CUSTOM, PROTOCOLS
from vistok.eval.record import check_result_folder, describe_images, library_versions, save_result
from vistok.eval.tokenizers import BatchConditions, DataImages, condition_of, to_rgb
from vistok.quantizers.perturbation import perturb, perturbation_draws
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track

UNCERTAIN = (
    "no official code for pFID exists and the published grid is unconfirmed: compare these numbers only with others of "
    "the same grid, not with published ones"
)


@dataclass(frozen=True)
class Grid:
    """The perturbations whose Frechet distances are averaged.

    Attributes:
        rates: alpha, the probability that a token is redrawn.
        strengths: delta, the number of nearest codes from which the new token is drawn; at most the codebook's size.
            The nearest code itself is one of them, so the share of changed tokens is alpha (1 - 1 / delta).

    Raises:
        ValueError: a rate is outside (0, 1], a strength is below 1, or the grid is empty.
    """

    rates: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    strengths: tuple[int, ...] = (200, 280, 360)

    def __post_init__(self) -> None:
        if not self.rates or not self.strengths:
            raise ValueError("the grid needs at least one rate and one strength")
        for rate in self.rates:
            if not 0 < rate <= 1:
                raise ValueError(f"a perturbation rate must lie in (0, 1], got {rate}")
        for strength in self.strengths:
            if strength < 1:
                raise ValueError(f"a perturbation strength must be at least 1 code, got {strength}")

    def cells(self, codebook_size: int) -> list[tuple[float, int]]:
        """All (rate, strength) pairs; strengths that are clipped to the same codebook size count once."""
        strengths = dict.fromkeys(min(strength, codebook_size) for strength in self.strengths)
        return [(rate, strength) for rate in self.rates for strength in strengths]


def evaluate_perturbation(
    tokenizer: Tokenizer,
    data: DataConfig,
    network: FeatureNetwork,
    *,
    grid: Grid = Grid(),
    seed: int = 0,
    conditions: BatchConditions | None = None,
    processes: Processes = ALONE,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Frechet distances between images and their reconstructions from perturbed tokens, and their mean, pFID.

    All images are perturbed, each token independently; image i uses the same random numbers in every cell of the grid.

    Args:
        tokenizer: has ``latents(pixels)``, a ``quantizer`` with ``neighbours``, and one id per position.
        data: the images; papers take ImageNet's validation set.
        network: the feature network. With a network of the user's own the scores are called
            ``perturbed_frechet_distance`` and ``frechet_distance``.
        conditions: conditions for a tokenizer that decodes with texts; None decodes without.
        processes: the processes that share the images; all of them return the result, the first one writes it.
        out: folder in which ``result.json`` is written.

    Returns:
        As ``evaluate``: ``scores`` holds ``pfid`` and ``rfid`` (no perturbation), ``cells`` every cell of the grid.

    Raises:
        ValueError: the tokenizer has continuous latents or residual codes, or no neighbours of codes.
    """
    check_result_folder(out)
    _check(tokenizer)
    tokenizer.check_renders("pFID")
    originals = DataImages(data)
    cells = grid.cells(tokenizer.spec.num_ids)
    passes = _passes(tokenizer, originals, cells, network, seed, conditions, processes)
    with full_precision():
        reference, *gaussians = (gathered(features, processes).moments["pool"].gaussian for features in passes)
        notes = count_warnings("images and reference", originals.count, {"pool": len(reference.mean)})
        distances = [m.frechet_distance(gaussian, reference) for gaussian in gaussians]
    rules = CUSTOM if isinstance(network, CallableNetwork) else PROTOCOLS["reconstruction"]
    fid = rules.rename({"fid": distances[0]})
    mean = sum(distances[1:]) / len(cells)
    result = {
        "protocol": "perturbation",
        "scores": {("pfid" if "rfid" in fid else "perturbed_frechet_distance"): mean} | fid,
        "cells": [
            {"rate": rate, "strength": strength, "fid": distance}
            for (rate, strength), distance in zip(cells, distances[1:])
        ],
        "images": {"source": f"perturbed reconstructions of {originals.source}", "count": originals.count},
        "reference": describe_images(originals),
        "network": rules.describe(network),
        "settings": {"grid": dataclasses.asdict(grid), "images_perturbed": "all", "seed": seed, "crop": data.crop},
        "tokenizer": {"model": tokenizer.registry_name, "fingerprint": tokenizer.fingerprint()},
        "versions": library_versions(),
        "warnings": [UNCERTAIN, *notes, *_clipped(grid, tokenizer.spec.num_ids)],
    }
    if out is not None and processes.is_first:
        save_result(result, out)
    return result


def _check(tokenizer: Tokenizer) -> None:
    quantizer = getattr(tokenizer, "quantizer", None)
    if not tokenizer.spec.discrete or tokenizer.spec.depth != 1:
        raise ValueError(
            f"pFID exchanges single ids; {type(tokenizer).__name__} has "
            + ("residual codes" if tokenizer.spec.discrete else "continuous latents")
        )
    if not hasattr(quantizer, "neighbours") or not hasattr(tokenizer, "latents"):
        name = type(tokenizer).__name__
        raise ValueError(f"{name} does not tell which codes are near, so it has no pFID (that is quantizer.neighbours)")


@torch.no_grad()
def _passes(
    tokenizer: Tokenizer,
    originals: DataImages,
    cells: list[tuple[float, int]],
    network: FeatureNetwork,
    seed: int,
    conditions: BatchConditions | None,
    processes: Processes,
) -> list[FeaturePass]:
    """Feature passes over this process's part of the images: originals, plain reconstructions, one per perturbation.

    Images are encoded once, always ``NETWORK_BATCH`` at a time, so that no pixel depends on the number of processes.
    """
    encode: Any = tokenizer.eval()  # Any: ``_check`` has ensured that it has ``latents``
    real, plain, *perturbed = (FeaturePass(network, originals.source, moments=["pool"]) for _ in range(len(cells) + 2))
    most = max(strength for _, strength in cells)
    first, stop = processes.part(originals.count)
    batches = originals.loaded(NETWORK_BATCH, first, stop)
    for batch in track(batches, f"perturbed {originals.source}", -(-(stop - first) // NETWORK_BATCH)):
        count, condition = len(batch.pixels), condition_of(conditions, batch, tokenizer.device)
        real.add(to_rgb(batch.pixels))
        latents = encode.latents(filled(batch.pixels).to(tokenizer.device, tokenizer.dtype))
        neighbours = tokenizer.quantizer.neighbours(latents, most)  # (NETWORK_BATCH, L, most)
        draws = perturbation_draws(Keys.range(seed, len(neighbours), first), neighbours.shape[1])
        plain.add(_decode(tokenizer, neighbours[..., 0], condition)[:count])
        for (rate, strength), features in zip(cells, perturbed):
            features.add(_decode(tokenizer, perturb(neighbours, rate, strength, draws), condition)[:count])
        first += count
    return [real, plain, *perturbed]


def _decode(tokenizer: Tokenizer, ids: Tensor, condition: Condition | None) -> Tensor:
    return to_rgb(tokenizer.decode(ids, condition=condition).clamp(-1, 1).cpu())


def _clipped(grid: Grid, codebook_size: int) -> list[str]:
    beyond = [strength for strength in grid.strengths if strength > codebook_size]
    if not beyond:
        return []
    return [f"strengths {beyond} exceed the codebook of {codebook_size:,} codes and were clipped to it"]
