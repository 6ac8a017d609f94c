"""Attention masks that several systems share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def visible_causal_mask(visible: Tensor, start: int = 0, *, prefix: int = 0) -> Tensor:
    """Causal attention that hides some entries: bool (R, 1, N - start, N), True where attention is allowed.

    The entries from ``start`` on see themselves, so that no row is empty, and the ``visible`` ones before them.

    Args:
        visible: (R, N) bool, of all entries so far.
        prefix: this many first entries also see each other's visible ones, whatever their order.
    """
    places = torch.arange(visible.shape[1], device=visible.device)
    queries = places[start:, None]
    seen = places <= queries.clamp_min(prefix - 1)
    return seen & visible[:, None, None] | (places == queries)


def prolonged(visible: Tensor, length: int) -> Tensor:
    """Which entries of a sequence are visible, (R, length) bool: ``visible`` (R, n) of the first ones, cut if they are
    more, and all that follow."""
    return F.pad(visible, (0, length - visible.shape[1]), value=True)


def prefix_causal_mask(prefix: int, length: int, device: torch.device | None = None) -> Tensor:
    """(length, length) bool, True where a query (row) may attend to a key (column): full attention within the first
    ``prefix`` positions, causal attention from the others."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask
