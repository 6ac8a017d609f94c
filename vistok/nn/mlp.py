"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear, activation, linear: (..., D) -> (..., D).

    Args:
        dim: width D.
        hidden_dim: width of the hidden layer.
        activation: an elementwise function.
        bias: whether the linears have biases.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor], *, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(silu(gate x) * up x), without biases."""

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


def llama_hidden_dim(dim: int, multiple_of: int = 256) -> int:
    """Hidden width of Llama's SwiGLU: two thirds of 4 * dim, rounded up to a multiple."""
    return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of
