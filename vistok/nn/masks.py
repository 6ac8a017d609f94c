"""Attention masks that several systems share."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_causal_mask(prefix: int, length: int, device: torch.device | None = None) -> Tensor:
    """(length, length) bool, True where a query (row) may attend to a key (column): full attention within the first
    ``prefix`` positions, causal attention from the others."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask
