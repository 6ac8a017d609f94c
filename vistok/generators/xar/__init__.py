"""xAR: next-X prediction by flow matching."""

from vistok.generators.xar.model import XAR

__all__ = ["XAR"]
