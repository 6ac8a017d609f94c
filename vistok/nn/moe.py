"""A mixture of experts (Switch Transformer, arXiv 2101.03961; DeepSeekMoE with shared experts, 2401.06066)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.containers import ModuleList
from vistok.nn.mlp import SwiGLU


class MixtureOfExperts(nn.Module):
    """A router chooses some of the experts, gated feed-forwards (SiLU, no biases), for each token: (B, N, D) -> same.

    Args:
        dim: width D.
        hidden_dim: hidden width of an expert.
        num_experts: experts E to choose from.
        experts_per_token: number k of chosen experts, those of the highest probability.
        num_shared_experts: further experts, which process every token, built as one layer of that many hidden widths.
        renormalise: whether the probabilities of the chosen experts are divided by their sum.
        num_routers: 1, or 2 routers over the same experts; ``forward`` is told which tokens the second one routes.

    Raises:
        ValueError: more experts per token than there are, or a number of routers other than 1 and 2.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        experts_per_token: int,
        *,
        num_shared_experts: int = 0,
        renormalise: bool = True,
        num_routers: int = 1,
    ):
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token must lie in 1..{num_experts}, got {experts_per_token}")
        if num_routers not in (1, 2):
            raise ValueError(f"num_routers must be 1 or 2, got {num_routers}")
        self.experts_per_token, self.renormalise = experts_per_token, renormalise
        self.routers = ModuleList(nn.Linear(dim, num_experts, bias=False) for _ in range(num_routers))
        self.gate, self.up = (nn.Parameter(torch.empty(num_experts, hidden_dim, dim)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        for weight in (self.gate, self.up, self.down):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
        self.shared = SwiGLU(dim, num_shared_experts * hidden_dim) if num_shared_experts else None

    def route(self, x: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights (..., k), in float32, and indices (..., k) of the experts of tokens (..., D).

        Args:
            second: (...,) bool, True for the tokens of the second router; None for none.
        """
        logits = self.routers[0](x)
        if second is not None and len(self.routers) > 1:
            logits = torch.where(second[..., None], self.routers[1](x), logits)
        weights, chosen = logits.float().softmax(-1).topk(self.experts_per_token, -1)
        return (weights / weights.sum(-1, keepdim=True) if self.renormalise else weights), chosen

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """``second`` is as in ``route``."""
        tokens = x.flatten(0, -2)  # (M, D)
        weights, chosen = self.route(tokens, None if second is None else second.flatten())
        few = chosen.numel() <= 4 * len(self.gate)
        out = (self._gathered if few else self._sorted)(tokens, chosen, weights.to(x.dtype)).view_as(x)
        return out if self.shared is None else out + self.shared(x)

    def _gathered(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The experts' outputs for few tokens: gathers the experts' weights for each token, without synchronising
        with the device."""
        gate = torch.einsum("mkhd,md->mkh", self.gate[chosen], tokens)
        up = torch.einsum("mkhd,md->mkh", self.up[chosen], tokens)
        return torch.einsum("mkdh,mkh,mk->md", self.down[chosen], F.silu(gate) * up, weights)

    def _sorted(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The experts' outputs for many tokens, sorted by expert; synchronises once, to read the number per expert."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.gate)).tolist()
        source = order // self.experts_per_token
        parts = [
            F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)
            for part, gate, up, down in zip(tokens[source].split(counts), self.gate, self.up, self.down, strict=True)
        ]
        done = torch.cat(parts) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, source, done.to(tokens.dtype))
