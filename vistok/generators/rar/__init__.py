"""RAR: a causal transformer trained on randomly permuted orders."""

from vistok.generators.rar.model import RAR

__all__ = ["RAR"]
