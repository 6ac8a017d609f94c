"""RandAR: a causal transformer over tokens in any order, each announced by a position instruction token."""

from vistok.generators.randar.model import RandAR

__all__ = ["RandAR"]
