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
        drop: of the hidden layer and of the output, in training.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Callable[[Tensor], Tensor],
        *,
        bias: bool = True,
        drop: float = 0.0,
    ):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation, self.drop = activation, nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(self.activation(self.up(x)))))


class GatedMLP(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(activation(gate x) * up x), (..., D) -> (..., D).

    Args:
        dim: width D.
        hidden_dim: width of the hidden layer.
        activation: an elementwise function.
        bias: whether the linears have biases.
        hidden_drop, drop: of the hidden layer and of the output, in training.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Callable[[Tensor], Tensor],
        *,
        bias: bool = True,
        hidden_drop: float = 0.0,
        drop: float = 0.0,
    ):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=bias)
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = activation
        self.hidden_drop, self.drop = nn.Dropout(hidden_drop), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.hidden_drop(self.activation(self.gate(x)) * self.up(x))))


class SwiGLU(GatedMLP):
    """Llama's gated feed-forward: SiLU, no biases."""

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0):
        super().__init__(dim, hidden_dim, F.silu, bias=False, drop=drop)


def rounded_hidden_dim(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Hidden width of Llama's SwiGLU: two thirds of 4 * dim, times ``multiplier``, rounded up to a multiple."""
    return -(-int(multiplier * int(2 * 4 * dim / 3)) // multiple_of) * multiple_of


def two_thirds(hidden_dim: int, multiple_of: int) -> int:
    """Hidden width of a gated layer with as many weights as a plain one of ``hidden_dim``, rounded up to a multiple."""
    return -(-int(hidden_dim * 2 / 3) // multiple_of) * multiple_of
