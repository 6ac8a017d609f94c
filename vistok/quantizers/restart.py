"""Restart of dead codes: codes that nobody chooses are moved to where the latents are."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn


class CodeRestart(nn.Module):
    """Moves every code that was not chosen for ``patience`` steps onto a random latent of the current batch.

    All codes start as dead, so the first batch places the codebook among the latents. Jukebox (arXiv 2005.00341,
    section 3.1) restarts codes like this. Random picks come from torch's global generator; with several processes the
    codes that rank 0 picks are used everywhere.

    Args:
        codebook_size: number of codes K.
        patience: training steps that a code may go unused.
    """

    def __init__(self, codebook_size: int, patience: int):
        super().__init__()
        if patience < 1:
            raise ValueError(f"patience must be at least 1 step, got {patience}")
        self.patience = patience
        self.register_buffer("idle", torch.full((codebook_size,), patience))

    @torch.no_grad()
    def forward(self, codebook: Tensor, latents: Tensor, ids: Tensor) -> None:
        """Update ``codebook`` (K, D) in place after latents (..., D) were given codes ids (...)."""
        latents = latents.reshape(-1, latents.shape[-1])
        used = torch.bincount(ids.flatten(), minlength=len(codebook)).clamp_max(1)
        picks = latents[torch.randint(len(latents), (len(codebook),), device=latents.device)].to(codebook.dtype)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(used, op=distributed.ReduceOp.MAX)
            distributed.broadcast(picks, src=0)
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        dead = self.idle > self.patience
        # Written without a branch on the device's data, which would wait for the device at every step.
        codebook.copy_(torch.where(dead[:, None], picks, codebook))
        self.idle.masked_fill_(dead, 0)
