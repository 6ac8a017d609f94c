"""Evaluation: scores of generated images and of reconstructions, recorded with everything that they depend on."""

from vistok.eval.comparison import evaluate
from vistok.eval.pairs import evaluate_reconstruction
from vistok.eval.protocols import PROTOCOLS
from vistok.eval.references import make_reference

__all__ = ["PROTOCOLS", "evaluate", "evaluate_reconstruction", "make_reference"]
