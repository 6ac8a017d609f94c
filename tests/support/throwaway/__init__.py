"""A throw-away system that no code outside this folder knows: tests add it by registry lines, one per model."""

from support.throwaway.generator import Scattered, ScatteredOptions
from support.throwaway.tokenizer import Pyramid

__all__ = ["Pyramid", "Scattered", "ScatteredOptions"]
