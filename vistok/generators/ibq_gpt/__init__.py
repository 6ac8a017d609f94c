"""IBQ's generator (arXiv 2412.02692)."""

from vistok.generators.ibq_gpt.model import IBQGPT

__all__ = ["IBQGPT"]
