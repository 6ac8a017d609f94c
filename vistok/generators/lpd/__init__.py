"""LPD: locality-aware parallel decoding by queries that see one another."""

from vistok.generators.lpd.model import LPD
from vistok.generators.lpd.sampling import LPDOptions

__all__ = ["LPD", "LPDOptions"]
