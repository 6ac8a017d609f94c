"""Sequences of different lengths in memory-mapped files: the conditions of the samples in a token cache.

A sample has any number of alternatives (several captions; the frames before each view). Each is a sequence of ids (n,)
or of vectors (n, D). One array holds all sequences of a shard, one after another; a second array holds their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vistok.conditions import FeatureSpec, IdSpec


class Piece(NamedTuple):
    """One sequence.

    Attributes:
        values: (n,) ids or (n, D) vectors.
        length: its length before it was cut to n; n if it was not cut.
    """

    values: np.ndarray
    length: int


class RaggedShard:
    """The sequences of one shard.

    Args:
        values: (total,) or (total, D), memory-mapped.
        lengths: (N, K) int32, before sequences were cut; 0 if a sample has fewer than K alternatives.
        most: the length that sequences were cut to.

    Attributes:
        counts: (N,) number of alternatives of each sample.
    """

    def __init__(self, values: np.ndarray, lengths: np.ndarray, most: int) -> None:
        self._values, self._kept, self._most = values, np.minimum(lengths, most), most
        ends = np.cumsum(self._kept.reshape(-1), dtype=np.int64).reshape(lengths.shape)
        self._starts = ends - self._kept
        self.counts = (lengths > 0).sum(1)

    def read(self, rows: np.ndarray, alternatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chosen alternative (B,) of each row (B,), padded on the left with zeros to the length ``most``.

        Returns:
            Values (B, T) or (B, T, D), and a mask (B, T) bool, False in the padding; a row without a sequence is all
            padding.
        """
        shape = (len(rows), self._most)
        if not self._kept.shape[1]:
            return np.zeros((*shape, *self._values.shape[1:]), self._values.dtype), np.zeros(shape, dtype=bool)
        lengths, starts = self._kept[rows, alternatives], self._starts[rows, alternatives]
        places = np.arange(self._most) - (self._most - lengths[:, None])  # (B, T), below 0 in the padding
        mask = places >= 0
        values = np.zeros((*shape, *self._values.shape[1:]), self._values.dtype)
        values[mask] = self._values[(starts[:, None] + places)[mask]]
        return values, mask


def pack(samples: Sequence[Sequence[Piece]], kind: IdSpec | FeatureSpec, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of a shard, in the form that :class:`RaggedShard` reads; empty sequences are left out.

    Raises:
        ValueError: a vector with another number of channels, an id out of range, or a number that ``dtype`` cannot
            hold.
    """
    kept = [[piece for piece in alternatives if len(piece.values)] for alternatives in samples]
    lengths = np.zeros((len(kept), max(map(len, kept), default=0)), np.int32)
    for row, alternatives in enumerate(kept):
        lengths[row, : len(alternatives)] = [piece.length for piece in alternatives]
    inner = (kind.dim,) if isinstance(kind, FeatureSpec) else ()
    pieces = [_checked(piece, kind, inner) for alternatives in kept for piece in alternatives]
    values = np.concatenate([np.empty((0, *inner), dtype), *pieces]).astype(dtype)
    if isinstance(kind, FeatureSpec) and not np.isfinite(values).all():
        raise ValueError(f"features have numbers that {np.dtype(dtype)} cannot hold; store them as float32")
    return values, lengths


def _checked(piece: Piece, kind: IdSpec | FeatureSpec, inner: tuple[int, ...]) -> np.ndarray:
    values = piece.values
    if values.shape[1:] != inner or len(values) != min(piece.length, kind.length):
        raise ValueError(f"expected at most {kind.length} values of shape {inner} each, got {values.shape}")
    if isinstance(kind, IdSpec) and (values.min() < 0 or values.max() >= kind.vocabulary_size):
        wrong = values[(values < 0) | (values >= kind.vocabulary_size)][0]
        raise ValueError(f"condition id {wrong} is out of range 0..{kind.vocabulary_size - 1}")
    return values


def stored_dtype(kind: IdSpec | FeatureSpec, features: str) -> str:
    """The name of the dtype that sequences of this kind are stored in; ``features`` names that of vectors."""
    if isinstance(kind, FeatureSpec):
        return features
    return "uint16" if kind.vocabulary_size <= 1 << 16 else "int32"


def pad_left(pieces: Sequence[np.ndarray | None], kind: IdSpec | FeatureSpec) -> tuple[Tensor, Tensor]:
    """Sequences as a batch: values (B, T) int64 or (B, T, D) float32, and a mask (B, T) bool, False in the padding.

    The row of a sequence that is None is all padding.
    """
    inner, dtype = ((kind.dim,), torch.float32) if isinstance(kind, FeatureSpec) else ((), torch.int64)
    values = torch.zeros(len(pieces), kind.length, *inner, dtype=dtype)
    mask = torch.zeros(len(pieces), kind.length, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        if piece is not None and len(piece):
            values[row, -len(piece) :] = torch.from_numpy(np.asarray(piece)).to(dtype)
            mask[row, -len(piece) :] = True
    return values, mask
