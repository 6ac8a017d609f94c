"""MaskGIT: masked generation in a few parallel steps."""

from vistok.generators.maskgit.model import MaskGIT

__all__ = ["MaskGIT"]
