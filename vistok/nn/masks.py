"""Attention masks that several systems share."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_causal_mask(prefix: int, length: int, device: torch.device | None = None) -> Tensor:
    """(length, length) bool, True where row may see column: every position sees the first ``prefix`` ones, and those
    see nothing else; a later position also sees itself and the later ones before it."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask
