"""Token-Shuffle: windows of image tokens as one position of a transformer, after a text."""

from vistok.generators.token_shuffle.model import SIZES, TokenShuffle, TokenShuffleOptions

__all__ = ["SIZES", "TokenShuffle", "TokenShuffleOptions"]
