"""Adaptive layer norm (DiT, arXiv 2212.09748): what a condition does to normalised activations."""

from __future__ import annotations

from torch import Tensor, nn

from vistok.nn.containers import Sequential


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, all broadcastable to one another."""
    return x * (1 + scale) + shift


def modulation(dim: int, parts: int) -> Sequential:
    """What a condition (..., D) is turned into: ``parts`` vectors (..., parts D)."""
    return Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class FinalModulation(nn.Module):
    """The norm before the logits, without weights of its own: scale and shift are the condition's.

    Args:
        dim: width D.
        eps: of the norm.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.modulation = modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D) with a condition (B, N, D), or (B, 1, D) for all positions."""
        scale, shift = self.modulation(condition).chunk(2, -1)  # in this order, unlike in most blocks
        return modulate(self.norm(x), shift, scale)
