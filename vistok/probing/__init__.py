"""Evaluate tokenizers by themselves, by a small generator that is trained on their tokens, and side by side."""

from vistok.probing.run import compare, probe
from vistok.probing.settings import ProbeSettings

__all__ = ["ProbeSettings", "compare", "probe"]
