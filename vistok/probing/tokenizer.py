"""Measurements of a tokenizer by itself: reconstructions, bits, use of codes, speed, linear probes of its features."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.config import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.data.tokens import TokenCache
from vistok.eval.clips import evaluate_clip_tokenizer
from vistok.eval.tokenizers import BatchConditions, evaluate_tokenizer
from vistok.probing.linear import linear_probe
from vistok.probing.networks import clip_network, image_network, lpips
from vistok.probing.settings import ProbeSettings
from vistok.tokenizers.base import Tokenizer
from vistok.train.tasks.images import example_batch
from vistok.types import TokenSpec
from vistok.utils.progress import track

MOST_CHANNELS = 8192
"""Most channels (positions times width) of a linear probe of tokens; above it, tokens are averaged over positions."""
TIMED_SECONDS = 1.0
TIMED_BATCH = 16


def describe(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    """Model name, fingerprint, number of parameters, token spec, and bits of an image's ids (None for latents)."""
    spec = tokenizer.spec_for(data.input_shape)
    return {
        "model": tokenizer.registry_name,
        "fingerprint": tokenizer.fingerprint(),
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "spec": dataclasses.asdict(spec),
        "bits_per_image": bits(spec),
    }


def bits(spec: TokenSpec) -> float | None:
    return spec.length * spec.depth * math.log2(spec.num_ids) if spec.discrete else None


def reconstruction(
    tokenizer: Tokenizer, data: DataConfig, settings: ProbeSettings, conditions: BatchConditions | None = None
) -> dict[str, Any] | None:
    """The result of ``evaluate_tokenizer`` or ``evaluate_clip_tokenizer`` on the held-out data.

    None for a tokenizer that decodes to neither pixels nor embeddings.

    Args:
        conditions: of images, for a tokenizer that decodes with texts.
    """
    if not (tokenizer.renders or tokenizer.embeds):
        return None
    device, distance = tokenizer.device, lpips(settings.lpips_weights, tokenizer.device)
    if data.num_frames is not None:
        network = clip_network(settings.network, settings.weights, device)
        return evaluate_clip_tokenizer(tokenizer, data, network=network, lpips=distance)
    if tokenizer.embeds:
        return evaluate_tokenizer(tokenizer, data)
    network = image_network(settings.network, settings.weights, device)
    return evaluate_tokenizer(tokenizer, data, network=network, lpips=distance, conditions=conditions)


def code_usage(cache: TokenCache) -> dict[str, float] | None:
    """The use of codes over the tokens of all images; None for latents.

    Returns:
        ``used``, the share of codes that occur; ``bits_per_token``, the entropy of the codes' frequencies in bits; and
        ``perplexity``, 2 to the power of the entropy.
    """
    spec = TokenSpec(**cache.spec)
    if not spec.discrete:
        return None
    counts = torch.zeros(spec.num_ids, dtype=torch.int64)
    for ids in _tokens(cache):
        counts += torch.bincount(ids.flatten(), minlength=spec.num_ids)
    share = counts[counts > 0].double() / counts.sum()
    entropy = -(share * share.log()).sum()
    return {
        "used": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp()),
        "bits_per_token": float(entropy) / math.log(2),
    }


@torch.no_grad()
def speed(tokenizer: Tokenizer, data: DataConfig) -> dict[str, float]:
    """Images or clips per second in batches of ``TIMED_BATCH``: ``encode``, and ``decode`` if it decodes to pixels."""
    tokenizer.eval()
    examples = example_batch(open_source(data), data, TIMED_BATCH).pixels.to(tokenizer.device, tokenizer.dtype)
    tokens = tokenizer.encode(examples)
    rates = {"encode": _rate(lambda: tokenizer.encode(examples), examples)}
    if tokenizer.renders:
        rates["decode"] = _rate(lambda: tokenizer.decode(tokens), examples)
    return rates


def _rate(work: Callable[[], Tensor], examples: Tensor) -> float:
    def run() -> None:
        work()
        if examples.device.type != "cpu":
            torch.accelerator.synchronize(examples.device)

    run()  # the first call is slower; the clock starts when the device has finished it
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < TIMED_SECONDS:
        run()
        count += len(examples)
    return count / (time.perf_counter() - begin)


def feature_probes(
    tokenizer: Tokenizer, train: TokenCache, test: TokenCache, data: DataConfig, held_out: DataConfig
) -> dict[str, Any]:
    """The results of linear probes by name; empty without at least two classes.

    "tokens" is the concatenation of the code vectors or latents of all positions. The others are the tokenizer's
    ``raster_features``, averaged over positions.
    """
    if min(len(labels.unique()) for labels in (train.labels, test.labels)) < 2:
        return {}
    features: dict[str, tuple[Any, Any]] = {"tokens": (_vectors(tokenizer, train), _vectors(tokenizer, test))}
    rasters = [_rasters(tokenizer, part) for part in (data, held_out)]
    features |= {name: (rasters[0][name], rasters[1][name]) for name in rasters[0]}
    return {name: labelled_probe(a, train.labels, b, test.labels) for name, (a, b) in features.items() if a is not None}


def labelled_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, Any]:
    """A linear probe on the samples that have a class."""
    own, other = train_labels >= 0, test_labels >= 0
    return linear_probe(train[own], train_labels[own], test[other], test_labels[other])


@torch.no_grad()
def _vectors(tokenizer: Tokenizer, cache: TokenCache) -> Tensor | None:
    """The vectors of all tokens as features (N, C); None if a position has several ids, which have no single vector."""
    spec = TokenSpec(**cache.spec)
    if spec.depth > 1:
        return None
    codes = tokenizer.codes().cpu().float() if spec.discrete else None
    parts = []
    for tokens in _tokens(cache):
        vectors = tokens[..., : spec.dim] if codes is None else codes[tokens]  # the slice takes the means of moments
        flat = vectors.flatten(1)
        parts.append(flat if flat.shape[1] <= MOST_CHANNELS else vectors.mean(1))
    return torch.cat(parts)


@torch.no_grad()
def _rasters(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Tensor]:
    names = list(tokenizer.raster_features)
    if not names or tokenizer.condition_spec.parts:
        return {}
    tokenizer.eval()
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    loader = evaluation_loader(open_source(data), data)
    for batch in track(loader, "features", len(loader)):
        output = tokenizer(batch.pixels.to(tokenizer.device, tokenizer.dtype))
        for name in names:
            found[name].append(output.features[name].float().mean(1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _tokens(cache: TokenCache, batch_size: int = 1024):
    """Yield the first view of all images, in order: ids (B, L[, depth]), latents (B, L, D) or moments (B, L, 2 D)."""
    for start in range(0, len(cache), batch_size):
        indices = np.arange(start, min(start + batch_size, len(cache)))
        yield cache.batch(indices, np.zeros_like(indices))[0]
