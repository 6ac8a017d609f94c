"""Decodings: ways of choosing ids. Each has its own draws and loop, over the same sessions and models."""

from vistok.generators.engine.contracts import Decoding
from vistok.generators.engine.decodings.cautious import Cautious
from vistok.generators.engine.decodings.jacobi import Jacobi
from vistok.generators.engine.decodings.plain import Plain

DECODINGS: dict[str, Decoding] = {"plain": Plain(), "jacobi": Jacobi(), "cautious": Cautious()}
"""All decodings, by the names that ``DecodingOptions.decoding`` takes."""

__all__ = ["DECODINGS", "Cautious", "Jacobi", "Plain"]
