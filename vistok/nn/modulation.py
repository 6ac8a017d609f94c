"""Adaptive layer norm (DiT, arXiv 2212.09748): scale and shift of normalised activations by a condition."""

from __future__ import annotations

from torch import Tensor, nn

from vistok.nn.containers import Sequential


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, all broadcastable to one another."""
    return x * (1 + scale) + shift


def modulation(dim: int, parts: int) -> Sequential:
    """A layer, SiLU and linear, from a condition (..., D) to ``parts`` vectors (..., parts D)."""
    return Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class FinalModulation(nn.Module):
    """The layer norm before the output, whose scale and shift come from a condition.

    Args:
        dim: width D.
        eps: of the norm.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.modulation = modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalise and modulate x (B, N, D) by a condition (B, N, D), or (B, 1, D) for all positions."""
        scale, shift = self.modulation(condition).chunk(2, -1)  # scale first, unlike in most blocks
        return modulate(self.norm(x), shift, scale)
