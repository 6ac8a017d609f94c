"""Llama over image tokens, one after another."""

from vistok.generators.llama.model import Llama, position_table

__all__ = ["Llama", "position_table"]
