"""Imports token caches of other codebases: ``vistok import-tokens``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistok.data.peers import PeerCacheError, PeerSample, check_alike, open_peer_cache
from vistok.data.token_writer import TokenWriter
from vistok.data.tokens import TokenCache
from vistok.pipelines.folders import TOKENIZER
from vistok.tokenizers.base import Tokenizer
from vistok.utils.progress import track

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
    names = tuple(classes or cache.classes or map(str, range(1 + max(sample.label for sample in cache))))
    writer = TokenWriter(
        out,
        dataclasses.asdict(tokenizer.spec),
        tokenizer.fingerprint(),
        views=len(first.values),
        content="moments" if holds_moments else "tokens",
        classes=names,
    )
    with writer:
        while batch := list(itertools.islice(samples, BATCH)):
            check_alike([first, *batch])
            _check_ids(tokenizer, batch)
            _check_labels(names, batch)
            writer.write(_tokens(tokenizer, batch), torch.tensor([sample.label for sample in batch]))
        tokenizer.save_pretrained(writer.folder / TOKENIZER)
    return TokenCache(out)


def _check_ids(tokenizer: Tokenizer, samples: Sequence[PeerSample]) -> None:
    if not tokenizer.spec.discrete:
        return
    size = tokenizer.spec.num_ids
    for sample in samples:
        wrong = sample.values[(sample.values < 0) | (sample.values >= size)]
        if wrong.size:
            raise PeerCacheError(f"{sample.where}: token id {wrong.flat[0]} is out of range 0..{size - 1}")


def _check_labels(names: Sequence[str], samples: Sequence[PeerSample]) -> None:
    for sample in samples if names else ():
        if not 0 <= sample.label < len(names):
            raise PeerCacheError(f"{sample.where}: label {sample.label} is out of range 0..{len(names) - 1}")


def _tokens(tokenizer: Tokenizer, samples: Sequence[PeerSample]) -> Tensor:
    """The tokens of samples: ids (B, V, L), or standardised moments (B, V, L, 2D)."""
    values = torch.from_numpy(np.stack([sample.values for sample in samples]))
    if not tokenizer.has_posterior:
        return values
    gaussian = tokenizer.gaussian
    return gaussian.standardised_moments(*gaussian.moments(values.float().flatten(3).transpose(2, 3)))
