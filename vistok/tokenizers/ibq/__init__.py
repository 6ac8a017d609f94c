"""IBQ's image tokenizer (arXiv 2412.02692)."""

from vistok.tokenizers.ibq.model import IBQ

__all__ = ["IBQ"]
