"""Restart of dead codes: codes that are never chosen move onto latents."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from vistok.utils.processes import group_size


class CodeRestart(nn.Module):
    """Moves every code that was not chosen for ``patience`` steps onto a random latent of the current batch.

    A forward pass counts unused steps and picks latents; ``move`` moves the dead codes, after the backward pass and
    before the optimizer's step. (Gradients need the old codes until then, and FSDP2 would lose what a forward pass
    writes into a weight.) Counts start at ``patience``, so all codes that the first batch does not choose move onto its
    latents. Jukebox (arXiv 2005.00341, section 3.1) restarts codes like this.

    All processes make the same picks, from the batches of all of them. Random numbers come from torch's global
    generator of the first process.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a code.
        patience: number of training steps that a code may be unused.
    """

    idle: Tensor
    places: Tensor

    def __init__(self, codebook_size: int, dim: int, patience: int):
        super().__init__()
        if patience < 1:
            raise ValueError(f"patience must be at least 1 step, got {patience}")
        self.patience = patience
        self.register_buffer("idle", torch.full((codebook_size,), patience))
        self.register_buffer("places", torch.zeros(codebook_size, dim), persistent=False)

    @torch.no_grad()
    def forward(self, latents: Tensor, ids: Tensor) -> None:
        """Count unused steps and pick latents, from latents (..., D) and the ids (...) of their codes."""
        used = torch.zeros_like(self.idle).scatter_(0, ids.flatten(), 1)  # bincount would synchronise with the device
        if group_size() > 1:
            distributed.all_reduce(used, op=distributed.ReduceOp.MAX)
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        self.places.copy_(self._picks(latents.flatten(0, -2)))

    def _picks(self, latents: Tensor) -> Tensor:
        """A random latent for each code, (K, D), of the latents (N, D) of all processes."""
        count, size = len(latents), group_size()
        chosen = torch.randint(count * size, (len(self.idle),), device=latents.device)
        process, row = chosen // count, chosen % count
        if size == 1:
            return latents[row].to(self.places.dtype)
        # all_reduce instead of broadcast: torch.compile takes it into its graph.
        choice = torch.stack([process, row]) * (distributed.get_rank() == 0)
        distributed.all_reduce(choice)
        process, row = choice
        own = latents[row % count].to(self.places.dtype)  # this process has fewer if images of it were unreadable
        picks = torch.where((process == distributed.get_rank())[:, None], own, 0)
        distributed.all_reduce(picks)
        return picks

    @torch.no_grad()
    def move(self, codebook: Tensor) -> None:
        """Move the dead codes of ``codebook`` (K, D) onto the latents that the last forward pass picked."""
        dead = self.idle > self.patience
        # Without a branch on device data, which would synchronise at every step.
        codebook.copy_(torch.where(dead[:, None], self.places, codebook))
        self.idle.masked_fill_(dead, 0)
