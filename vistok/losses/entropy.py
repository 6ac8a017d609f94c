"""The entropy loss, which asks for confident codes per position and even use of all codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistok.utils.processes import mean_over_group


class EntropyLoss(nn.Module):
    """Mean entropy of each position's code probabilities, minus the entropy of their mean over the batch.

    Probabilities are softmax(-distance / temperature). The loss is low where every position is sure of its code
    and the batch as a whole uses all codes evenly (MaskGIT, Chang et al. 2022; LlamaGen's quantizer). In training, the
    batch is that of all processes together, so with equal shares they minimise what a single one would.

    Args:
        temperature: of the softmax, positive.
    """

    def __init__(self, temperature: float = 0.01):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, distances: Tensor) -> Tensor:
        """Return the scalar loss in nats, between -log K and 0, from distances (..., K) to the K codes."""
        scores = -distances.flatten(0, -2) / self.temperature  # (positions, K)
        probabilities = scores.softmax(dim=-1)
        position_entropy = -(probabilities * scores.log_softmax(dim=-1)).sum(dim=-1).mean()
        usage = probabilities.mean(dim=0)
        if self.training:
            usage = mean_over_group(usage)
        usage_entropy = -(usage * torch.log(usage + 1e-5)).sum()  # the shift keeps unused codes finite
        return position_entropy - usage_entropy
