"""Training: configs, objectives, the loop, checkpoints."""

from vistok.train.loop import TrainingDivergedError, train

__all__ = ["TrainingDivergedError", "train"]
