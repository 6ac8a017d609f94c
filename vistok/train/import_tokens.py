"""Imports token caches of other codebases: ``vistok import-tokens``."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistok.data.peers import PeerCache, PeerCacheError, PeerSample, check_alike, open_peer_cache
from vistok.data.tar import UNCONDITIONAL
from vistok.data.token_writer import TokenWriter
from vistok.data.tokens import TokenCache
from vistok.pipelines.folders import TOKENIZER
from vistok.tokenizers.base import Tokenizer
from vistok.utils.outputs import appearing
from vistok.utils.progress import track

log = logging.getLogger(__name__)

BATCH = 256


def import_tokens(
    format_name: str, root: str | Path, tokenizer: Tokenizer, out: str | Path, *, classes: Sequence[str] | None = None
) -> TokenCache:
    """Write the samples of another codebase's cache as the token cache ``out``.

    The tokens do not show whether this tokenizer made them. The user has to look at some decoded tokens
    (``vistok train --dry-run`` shows a batch).

    Args:
        format_name: one of :func:`vistok.data.peers.formats`, such as jsonl.
        tokenizer: the one that made the tokens, for example converted from its official checkpoint.
        classes: names in the order of the labels; None takes those of the cache, or the ids as text.

    Raises:
        FileExistsError: ``out`` exists.
        PeerCacheError: ``root`` is not in this format, a file is damaged, the kind of tokens is not the tokenizer's, or
            ids or labels are out of range.
        ValueError: the number of tokens is not the tokenizer's.
    """
    cache = open_peer_cache(format_name, root)
    samples = track(cache, f"samples of {root}", len(cache))
    first = next(iter(cache))
    holds_moments = first.values.ndim == 4
    if holds_moments != tokenizer.has_posterior:
        held = "moments of a posterior" if holds_moments else "ids"
        raise PeerCacheError(f"{root} holds {held}, which a {type(tokenizer).__name__} does not make")
    _check_shape(tokenizer, first)
    names = tuple(classes or cache.classes or _numbered_classes(cache))
    writer = TokenWriter(
        out,
        dataclasses.asdict(tokenizer.spec),
        tokenizer.fingerprint(),
        views=len(first.values),
        content="moments" if holds_moments else "tokens",
        classes=names,
    )
    with appearing(Path(out)), writer:
        while batch := list(itertools.islice(samples, BATCH)):
            check_alike([first, *batch])
            _check_ids(tokenizer, batch)
            _check_labels(names, batch)
            writer.write(_tokens(tokenizer, batch), torch.tensor([sample.label for sample in batch]))
        tokenizer.save_pretrained(writer.folder / TOKENIZER)
    return TokenCache(out)


def _numbered_classes(cache: PeerCache) -> list[str]:
    """The class ids of a cache without names, from 0 to the largest; a warning if most of them have no sample."""
    labels = {sample.label for sample in cache} - {UNCONDITIONAL}
    count = 1 + max(labels, default=-1)
    if len(labels) < count / 2:
        log.warning(
            "only %d of the %d classes that the ids 0..%d stand for have a sample; are they ids of something else?",
            len(labels),
            count,
            count - 1,
        )
    return [str(label) for label in range(count)]


def _check_shape(tokenizer: Tokenizer, sample: PeerSample) -> None:
    """Raise PeerCacheError unless a sample has as many tokens as the tokenizer makes of an image."""
    spec, shape = tokenizer.spec, sample.values.shape
    if tokenizer.has_posterior:
        fits, expected = shape[1] == 2 * spec.dim and shape[2] * shape[3] == spec.length, f"{2 * spec.dim} x h x w"
    else:
        fits, expected = shape[1:] == (spec.length,) and spec.depth == 1, f"{spec.length} x {spec.depth}"
    if not fits or not shape[0]:
        raise PeerCacheError(
            f"{sample.where} holds {' x '.join(map(str, shape[1:]))} values in {shape[0]} views, but this "
            f"{type(tokenizer).__name__} makes {expected} of an image, {spec.length} tokens; name the tokenizer that "
            "made them, built for images of their size"
        )


def _check_ids(tokenizer: Tokenizer, samples: Sequence[PeerSample]) -> None:
    if not tokenizer.spec.discrete:
        return
    size = tokenizer.spec.num_ids
    for sample in samples:
        wrong = sample.values[(sample.values < 0) | (sample.values >= size)]
        if wrong.size:
            raise PeerCacheError(
                f"{sample.where}: token id {wrong.flat[0]} is out of range 0..{size - 1} of this "
                f"{type(tokenizer).__name__}; name the tokenizer that made the tokens"
            )


def _check_labels(names: Sequence[str], samples: Sequence[PeerSample]) -> None:
    for sample in samples if names else ():
        if not 0 <= sample.label < len(names):
            raise PeerCacheError(
                f"{sample.where}: label {sample.label} is out of range 0..{len(names) - 1}; every sample needs one of "
                f"the {len(names)} classes, or all of them -1 and no class names"
            )


def _tokens(tokenizer: Tokenizer, samples: Sequence[PeerSample]) -> Tensor:
    """The tokens of samples: ids (B, V, L), or standardised moments (B, V, L, 2D)."""
    values = torch.from_numpy(np.stack([sample.values for sample in samples]))
    if not tokenizer.has_posterior:
        return values
    gaussian = tokenizer.gaussian
    return gaussian.standardised_moments(*gaussian.moments(values.float().flatten(3).transpose(2, 3)))
