"""Open-MAGVIT2's generator (arXiv 2409.04410)."""

from vistok.generators.open_magvit2_gpt.model import OpenMAGVIT2GPT

__all__ = ["OpenMAGVIT2GPT"]
