"""Clustering of a codebook: codes that are seldom chosen move to the latents that lie nearest to them.

Online Clustered Codebook (Zheng and Vedaldi, arXiv 2307.15139), with the constants of TA-TiTok (arXiv 2501.07730).
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from vistok.utils.processes import group_size, mean_over_group

DECAY = 0.99
RARITY = 10.0  # how much rarer than the average a code must be to stay where it is, as the exponent below has it


class CodeClustering(nn.Module):
    """Moves every code towards the nearest latent of the batch, the more the less often it is chosen.

    A running average p of how often a code is chosen, 0 at first, gives the share a = exp(-p K 10 / (1 - decay) - 1e-3)
    by which the code is replaced by the latent. A forward pass measures and picks; ``move`` does it, after the
    backward pass and before the optimizer's step. Several processes pick from the batch of all of them.

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
        """Measure the use of codes, and pick new places.

        Args:
            latents: (..., D), which codes may be moved to.
            distances: (..., K) to the codes, which say what is near.
            ids: (...) that were chosen.
        """
        codebook_size = len(self.usage)
        counts = torch.zeros_like(self.usage).scatter_add_(0, ids.flatten(), self.usage.new_ones(ids.numel()))
        self.usage.lerp_(mean_over_group(counts / ids.numel()), 1 - self.decay)
        nearest, row = distances.reshape(-1, codebook_size).min(0)  # (K,) each
        self.places.copy_(_of_all_processes(latents.flatten(0, -2)[row].to(self.places.dtype), nearest))

    @torch.no_grad()
    def move(self, codebook: Tensor) -> None:
        """Move the codes (K, D) to the places that the last forward pass picked, by their shares."""
        share = torch.exp(-self.usage * len(self.usage) * RARITY / (1 - self.decay) - 1e-3)
        codebook.lerp_(self.places, share[:, None])


def _of_all_processes(candidates: Tensor, distances: Tensor) -> Tensor:
    """The nearest candidates (K, D) of all processes: for each code those of the process with the least distance
    (K,)."""
    size = group_size()
    if size == 1:
        return candidates
    gathered = [torch.empty_like(distances) for _ in range(size)]
    distributed.all_gather(gathered, distances.contiguous())
    best = torch.stack(gathered).argmin(0)  # (K,) the process whose candidate is nearest
    chosen = torch.where((best == distributed.get_rank())[:, None], candidates, 0)
    distributed.all_reduce(chosen)
    return chosen
