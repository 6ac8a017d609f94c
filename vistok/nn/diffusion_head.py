"""The MLP that denoises single continuous tokens (MAR, arXiv 2406.11838, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vistok.nn.containers import ModuleList
from vistok.nn.mlp import MLP, GatedMLP
from vistok.nn.modulation import modulate, modulation
from vistok.nn.timesteps import TimestepEmbedding


class HeadBlock(nn.Module):
    """Residual block, modulated by the condition: (M, W) -> (M, W)."""

    def __init__(self, dim: int, gated_dim: int | None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.mlp = MLP(dim, dim, F.silu) if gated_dim is None else GatedMLP(dim, gated_dim, F.silu)
        self.modulation = modulation(dim, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, -1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class DiffusionHead(nn.Module):
    """The network that denoises single tokens, (M, d) -> (M, output_dim).

    Args:
        token_dim: channels d of a token.
        condition_dim: channels of the conditioning vectors.
        dim: width W.
        num_layers: residual blocks.
        output_dim: channels of the prediction; None is 2d, noise and then variance values.
        gated_dim: hidden width of gated feed-forwards in the blocks; None uses plain ones of hidden width W.
    """

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        dim: int,
        num_layers: int,
        *,
        output_dim: int | None = None,
        gated_dim: int | None = None,
    ):
        super().__init__()
        self.time_embedding = TimestepEmbedding(dim, 256)
        self.condition = nn.Linear(condition_dim, dim)
        self.input = nn.Linear(token_dim, dim)
        self.blocks = ModuleList(HeadBlock(dim, gated_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.modulation = modulation(dim, 2)
        self.output = nn.Linear(dim, 2 * token_dim if output_dim is None else output_dim)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Denoise.

        Args:
            x: (M, d) noisy tokens.
            t: (M,) timesteps, or (1,) for all tokens.
            condition: (M, W), the conditioning vectors after the layer ``condition``.
        """
        y = self.time_embedding(t) + condition
        x = self.input(x)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulation(y).chunk(2, -1)
        return self.output(modulate(self.norm(x), shift, scale))

    def initialise(self) -> None:
        """Normal weights in the time embedding, zero ones in modulations and output. If the caller has zeroed the
        biases, blocks start as the identity, and the output at zero."""
        for layer in (self.time_embedding.mlp[0], self.time_embedding.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation[1] for block in self.blocks), self.modulation[1], self.output):
            nn.init.zeros_(layer.weight)
