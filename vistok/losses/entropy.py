"""The entropy loss, which is low if each position is confident of its code and all codes are used evenly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.utils.devices import without_autocast
from vistok.utils.processes import mean_over_group


class Entropies(NamedTuple):
    """Both entropies of a batch's code probabilities, scalars in nats.

    Attributes:
        position: the entropy of a position's probabilities, averaged over positions.
        usage: the entropy of the mean probabilities of all positions, between 0 and log K.
    """

    position: Tensor
    usage: Tensor


class EntropyLoss(nn.Module):
    """The mean entropy of each position's code probabilities, minus the entropy of their mean over the batch.

    Probabilities are softmax(-distance / temperature). The loss is low if every position is confident of its code
    and the batch uses all codes evenly (MaskGIT, Chang et al. 2022; LlamaGen's quantizer). In training, probabilities
    are averaged over all processes, so that several processes minimise the same loss as one with the whole batch.

    Args:
        temperature: of the softmax, positive.
        position_weight, usage_weight: weights of the two entropies.

    Raises:
        ValueError: ``temperature`` is not positive.
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
        """The entropy of mean probabilities (K,)."""
        if self.training:
            shares = mean_over_group(shares)
        return -(shares * torch.log(shares + 1e-5)).sum()  # 1e-5 keeps the log of unused codes finite

    def forward(self, distances: Tensor) -> Tensor:
        """The scalar loss in nats from distances (..., K) to the K codes; between -log K and 0 if both weights are
        1."""
        position, usage = self.entropies(distances)
        return self.position_weight * position - self.usage_weight * usage


class BitEntropyLoss(EntropyLoss):
    """The entropy loss over the K = 2^d sign vectors c, whose probabilities are softmax(2 z.c / temperature).

    This softmax is a product over bits: bit i is positive with probability sigmoid(4 z_i / temperature). So the entropy
    of a position is a sum of d binary entropies. The mean over positions is the product of two matrices, one for each
    half of the bits. So no (positions, K) table is needed, which would take 2 GiB at 2^18 codes (and 2,048 positions).
    """

    def entropies(self, latents: Tensor) -> Entropies:
        """Both entropies from latents (..., d), computed in float32."""
        with without_autocast(latents.device):
            odds = 4 / self.temperature * latents.float().flatten(0, -2)  # (positions, d), log-odds of the sign +
            positive, negative = odds.sigmoid(), (-odds).sigmoid()
            position = (positive * F.softplus(-odds) + negative * F.softplus(odds)).sum(-1).mean()
            bits = torch.stack([negative, positive], -1)  # (positions, d, 2)
            half = bits.shape[1] // 2
            low, high = _products(bits[:, :half]), _products(bits[:, half:])
            return Entropies(position, self._usage((high.T @ low).flatten() / len(bits)))


def _products(bits: Tensor) -> Tensor:
    """Probabilities (P, 2^n) of all values of n bits, from those (P, n, 2) of each bit; the first bit is the lowest."""
    table = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        table = (bit[:, :, None] * table[:, None]).flatten(1)
    return table
