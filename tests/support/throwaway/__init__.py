"""A throw-away system, which is known to nobody outside of this folder: tests add it by a line of the registry each."""

from support.throwaway.generator import Scattered, ScatteredOptions
from support.throwaway.tokenizer import Pyramid

__all__ = ["Pyramid", "Scattered", "ScatteredOptions"]
