"""Symmetric contrastive losses, as in CLIP (arXiv 2103.00020)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from vistok.utils.processes import group_size


def symmetric_cross_entropy(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy, in nats, of the rows and of the columns of logits (B, B).

    Args:
        target: (B,) the right column of each row and the right row of each column; or (B, B), symmetric up to the sums
            of its rows, the probabilities of each.
    """
    rows, columns = (F.cross_entropy(part, target, label_smoothing=label_smoothing) for part in (logits, logits.T))
    return (rows + columns) / 2


def contrastive_loss(features: Tensor, partners: Tensor, *, scale: float = 1.0, normalise: bool = False) -> Tensor:
    """The symmetric contrastive loss over the batch of all processes, in nats.

    Args:
        features, partners: (B, D); row i of one belongs to row i of the other.
        scale: factor of the inner products.
        normalise: whether vectors are l2-normalised first.

    Raises:
        ValueError: the shapes differ.
    """
    if features.shape != partners.shape:
        raise ValueError(f"features {tuple(features.shape)} and partners {tuple(partners.shape)} differ in shape")
    features, partners = (_of_all_processes(values.float()) for values in (features, partners))
    if normalise:
        features, partners = F.normalize(features, dim=-1), F.normalize(partners, dim=-1)
    logits = scale * features @ partners.T
    return symmetric_cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _of_all_processes(values: Tensor) -> Tensor:
    """Gather the rows (W B, D) of all W processes, with gradients to the rows of each."""
    if group_size() == 1:
        return values
    import torch.distributed.nn.functional

    return torch.cat(distributed.nn.functional.all_gather(values))
