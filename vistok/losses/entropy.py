"""The entropy loss, which asks for confident codes per position and even use of all codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.utils.devices import without_autocast
from vistok.utils.processes import mean_over_group


class Entropies(NamedTuple):
    """Both entropies of a batch's code probabilities in nats, scalars.

    Attributes:
        position: the mean entropy of a position's.
        usage: the entropy of their mean over all positions, between 0 and log K.
    """

    position: Tensor
    usage: Tensor


class EntropyLoss(nn.Module):
    """Mean entropy of each position's code probabilities, minus the entropy of their mean over the batch.

    Probabilities are softmax(-distance / temperature). The loss is low where every position is sure of its code
    and the batch as a whole uses all codes evenly (MaskGIT, Chang et al. 2022; LlamaGen's quantizer). In training the
    mean is over the batches of all processes, which together minimise what a single process would.

    Args:
        temperature: of the softmax, positive.
        position_weight, usage_weight: of both entropies.
    """

    def __init__(self, temperature: float = 0.01, *, position_weight: float = 1.0, usage_weight: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.position_weight, self.usage_weight = position_weight, usage_weight

    def entropies(self, distances: Tensor) -> Entropies:
        """Both entropies from distances (..., K) to the K codes."""
        scores = -distances.flatten(0, -2) / self.temperature  # (positions, K)
        probabilities = scores.softmax(dim=-1)
        position = -(probabilities * scores.log_softmax(dim=-1)).sum(dim=-1).mean()
        return Entropies(position, self._usage(probabilities.mean(dim=0)))

    def _usage(self, shares: Tensor) -> Tensor:
        """The entropy of the mean probabilities (K,)."""
        if self.training:
            shares = mean_over_group(shares)
        return -(shares * torch.log(shares + 1e-5)).sum()  # the shift keeps unused codes finite

    def forward(self, distances: Tensor) -> Tensor:
        """Return the scalar loss in nats, between -log K and 0 at equal weights, from distances (..., K) to the K
        codes."""
        position, usage = self.entropies(distances)
        return self.position_weight * position - self.usage_weight * usage


class BitEntropyLoss(EntropyLoss):
    """The entropy loss over the K = 2^d sign vectors c, whose probabilities are softmax(2 z.c / temperature).

    That softmax is a product over bits: bit i is positive with probability sigmoid(4 z_i / temperature). So a
    position's entropy is a sum of d binary ones, and the mean over positions is a product of two matrices, one for each
    half of the bits: no (positions, K) table is made, which at 2^18 codes would have 2 GiB.
    """

    def entropies(self, latents: Tensor) -> Entropies:
        """Both entropies from latents (..., d), computed in float32."""
        with without_autocast(latents.device):
            odds = 4 / self.temperature * latents.float().flatten(0, -2)  # (positions, d), of the sign + against -
            positive, negative = odds.sigmoid(), (-odds).sigmoid()
            position = (positive * F.softplus(-odds) + negative * F.softplus(odds)).sum(-1).mean()
            bits = torch.stack([negative, positive], -1)  # (positions, d, 2)
            half = bits.shape[1] // 2
            low, high = _products(bits[:, :half]), _products(bits[:, half:])
            return Entropies(position, self._usage((high.T @ low).flatten() / len(bits)))


def _products(bits: Tensor) -> Tensor:
    """Probabilities (P, 2^n) of all values of n bits, the first one lowest, from those (P, n, 2) of each."""
    table = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        table = (bit[:, :, None] * table[:, None]).flatten(1)
    return table
