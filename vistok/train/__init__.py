"""Training: configs, objectives, the loop, checkpoints."""

from vistok.train.loop import TrainingDivergedError, train
from vistok.train.stopping import TrainingInterrupted

__all__ = ["TrainingDivergedError", "TrainingInterrupted", "train"]
