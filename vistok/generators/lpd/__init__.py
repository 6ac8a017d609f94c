"""LPD: locality-aware parallel decoding from position queries."""

from vistok.generators.lpd.model import LPD
from vistok.generators.lpd.sampling import LPDOptions

__all__ = ["LPD", "LPDOptions"]
