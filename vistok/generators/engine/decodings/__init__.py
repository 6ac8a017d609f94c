"""How ids are chosen: each decoding has draws and a loop of its own over the same sessions and models."""

from vistok.generators.engine.contracts import Decoding
from vistok.generators.engine.decodings.cautious import Cautious
from vistok.generators.engine.decodings.jacobi import Jacobi
from vistok.generators.engine.decodings.plain import Plain

DECODINGS: dict[str, Decoding] = {"plain": Plain(), "jacobi": Jacobi(), "cautious": Cautious()}
"""All decodings, by the names that ``DecodingOptions.decoding`` takes."""

__all__ = ["DECODINGS", "Cautious", "Jacobi", "Plain"]
