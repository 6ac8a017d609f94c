"""Quantizers: latents to codes and back."""

from vistok.quantizers.fsq import FSQ
from vistok.quantizers.index import IndexQuantizer
from vistok.quantizers.lfq import LFQ
from vistok.quantizers.multiscale import MultiScaleQuantizer
from vistok.quantizers.spherical import BSQ
from vistok.quantizers.stochastic import StochasticQuantizer
from vistok.quantizers.vq import ResidualQuantizer, VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "IndexQuantizer",
    "MultiScaleQuantizer",
    "ResidualQuantizer",
    "StochasticQuantizer",
    "VectorQuantizer",
]
