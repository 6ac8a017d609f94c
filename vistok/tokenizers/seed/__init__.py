"""SEED: a tokenizer that turns an image into causal semantic ids, and ids into an image embedding."""

from vistok.tokenizers.seed.model import SEED
from vistok.tokenizers.seed.networks import TowerConfig

__all__ = ["SEED", "TowerConfig"]
