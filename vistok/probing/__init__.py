"""Judging tokenizers: by themselves, by a small generator on their tokens, and side by side."""

from vistok.probing.run import compare, probe
from vistok.probing.settings import ProbeFolderError, ProbeSettings

__all__ = ["ProbeFolderError", "ProbeSettings", "compare", "probe"]
