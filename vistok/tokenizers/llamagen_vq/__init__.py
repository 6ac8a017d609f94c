"""LlamaGen's image tokenizer (arXiv 2406.06525)."""

from vistok.tokenizers.llamagen_vq.model import LlamaGenVQ

__all__ = ["LlamaGenVQ"]
