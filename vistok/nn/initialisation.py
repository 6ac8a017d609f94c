"""Initial weights of layers, for ``nn.Module.apply``."""

from __future__ import annotations

from torch import nn


def truncated_normal(module: nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights and zero biases of linear layers, 2D convolutions and embeddings."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def xavier_uniform(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of linear layers and 3D convolutions, whose weights count as matrices
    (C_out, C_in * kernel)."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
