"""Training: configs, objectives, the training loop, checkpoints."""

from vistok.train.loop import TrainingDivergedError, train
from vistok.train.stopping import TrainingInterrupted

__all__ = ["TrainingDivergedError", "TrainingInterrupted", "train"]
