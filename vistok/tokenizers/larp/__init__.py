"""LARP: clips as ordered holistic tokens."""

from vistok.tokenizers.larp.model import LARP

__all__ = ["LARP"]
