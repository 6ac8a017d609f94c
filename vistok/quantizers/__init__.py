"""Quantizers: latents to codes and back."""

from vistok.quantizers.fsq import FSQ
from vistok.quantizers.multiscale import MultiScaleQuantizer
from vistok.quantizers.stochastic import StochasticQuantizer
from vistok.quantizers.vq import ResidualQuantizer, VectorQuantizer

__all__ = ["FSQ", "MultiScaleQuantizer", "ResidualQuantizer", "StochasticQuantizer", "VectorQuantizer"]
