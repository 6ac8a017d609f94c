"""FlexTok: ordered one-dimensional tokens of flexible number, and a flow decoder."""

from vistok.tokenizers.flextok.model import FlexTok

__all__ = ["FlexTok"]
