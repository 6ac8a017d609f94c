"""Open-MAGVIT2's image tokenizer (arXiv 2409.04410)."""

from vistok.tokenizers.open_magvit2.model import OpenMAGVIT2

__all__ = ["OpenMAGVIT2"]
