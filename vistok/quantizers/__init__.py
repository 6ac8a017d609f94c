"""Quantizers: latents to codes and back."""

from vistok.quantizers.vq import ResidualQuantizer, VectorQuantizer

__all__ = ["ResidualQuantizer", "VectorQuantizer"]
