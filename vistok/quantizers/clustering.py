"""Clustering of a codebook: rarely chosen codes move to their nearest latents.

Online Clustered Codebook (Zheng and Vedaldi, arXiv 2307.15139), with the constants of TA-TiTok (arXiv 2501.07730).
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from vistok.utils.processes import group_size, mean_over_group

DECAY = 0.99
RARITY = 10.0  # factor in the exponent of the share a below: the larger, the rarer a code must be to move


class CodeClustering(nn.Module):
    """Moves each code towards its nearest latent of the batch; the rarer a code is chosen, the further it moves.

    The running average p of how often a code is chosen, 0 at first, gives a = exp(-p K 10 / (1 - decay) - 1e-3), and
    the code becomes (1 - a) code + a latent. A forward pass updates p and picks the latents; ``move`` moves the codes,
    after the backward pass and before the optimizer's step. Several processes pick from the batch of all of them.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a code.
        decay: of the average, in [0, 1).
    """

    usage: Tensor
    places: Tensor

    def __init__(self, codebook_size: int, dim: int, decay: float = DECAY):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("usage", torch.zeros(codebook_size))
        self.register_buffer("places", torch.zeros(codebook_size, dim), persistent=False)

    @torch.no_grad()
    def forward(self, latents: Tensor, distances: Tensor, ids: Tensor) -> None:
        """Update the usage of codes, and pick the latents that they move to.

        Args:
            latents: (..., D), the candidates.
            distances: (..., K) from the latents to the codes.
            ids: (...), the codes that were chosen.
        """
        codebook_size = len(self.usage)
        counts = torch.zeros_like(self.usage).scatter_add_(0, ids.flatten(), self.usage.new_ones(ids.numel()))
        self.usage.lerp_(mean_over_group(counts / ids.numel()), 1 - self.decay)
        nearest, row = distances.reshape(-1, codebook_size).min(0)  # (K,) each
        self.places.copy_(_of_all_processes(latents.flatten(0, -2)[row].to(self.places.dtype), nearest))

    @torch.no_grad()
    def move(self, codebook: Tensor) -> None:
        """Move the codes (K, D) towards the latents that the last forward pass picked."""
        share = torch.exp(-self.usage * len(self.usage) * RARITY / (1 - self.decay) - 1e-3)
        codebook.lerp_(self.places, share[:, None])


def _of_all_processes(candidates: Tensor, distances: Tensor) -> Tensor:
    """Candidates (K, D): for each code that of the process with the smallest distance (K,)."""
    size = group_size()
    if size == 1:
        return candidates
    gathered = [torch.empty_like(distances) for _ in range(size)]
    distributed.all_gather(gathered, distances.contiguous())
    best = torch.stack(gathered).argmin(0)  # (K,) the process whose candidate is nearest
    chosen = torch.where((best == distributed.get_rank())[:, None], candidates, 0)
    distributed.all_reduce(chosen)
    return chosen
