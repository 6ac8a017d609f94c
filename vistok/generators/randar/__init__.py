"""RandAR: a causal transformer over tokens in any order, each after a position instruction token."""

from vistok.generators.randar.larger import sample_larger
from vistok.generators.randar.model import RandAR

__all__ = ["RandAR", "sample_larger"]
