"""A masked generator: tokens are filled in at all places at once, in a few steps."""

from vistok.generators.maskgit.model import MaskGIT

__all__ = ["MaskGIT"]
