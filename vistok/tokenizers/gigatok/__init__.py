"""GigaTok: tokenizers that scale to 3 billion parameters."""

from vistok.tokenizers.gigatok.model import GigaTok

__all__ = ["GigaTok"]
