"""Token-Shuffle: a transformer over a text and windows of image tokens, one position per window."""

from vistok.generators.token_shuffle.model import SIZES, TokenShuffle, TokenShuffleOptions

__all__ = ["SIZES", "TokenShuffle", "TokenShuffleOptions"]
