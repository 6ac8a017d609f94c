"""VAR's multi-scale image tokenizer."""

from vistok.tokenizers.var_vq.model import VARVQ

__all__ = ["VARVQ"]
