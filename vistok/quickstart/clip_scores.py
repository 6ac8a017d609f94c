"""Scores of generated clips of moving digits: the digit they show, how it moves, and how well frames are predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.data.config import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.data.tokens import TokenCache
from vistok.eval.video import psnr
from vistok.quickstart.scores import CLASSES, cached_tokens, encode, reconstruct, repeated_ids
from vistok.tokenizers.base import Tokenizer

COPIES_OF_CLIPS = "equal to the tokens of a training clip as it is, or of any view that the generator trained on"
FLOOR = 0.25  # brightness in [0, 1] above which a pixel belongs to the digit


@dataclass(frozen=True)
class Clips:
    """Clips, each with the class that it shows, or that was asked for.

    Attributes:
        pixels: (N, 1, T, H, W) in [-1, 1].
        labels: (N,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def frames(self) -> tuple[Tensor, Tensor]:
        """All frames (N * T, 1, H, W), and the label of each."""
        frames = self.pixels.transpose(1, 2).flatten(0, 1)
        return frames, self.labels.repeat_interleave(self.pixels.shape[2])


@dataclass(frozen=True)
class ClipScores:
    """The quickstart's scores of clips; shares are in [0, 1].

    Attributes:
        recognised: share of generated frames that the classifier assigns to the class asked for.
        recognised_real: share of frames of held-out clips that it classifies correctly.
        displacement: mean pixels by which the centre of mass moves from frame to frame in generated clips.
        displacement_real: the same for held-out clips.
        distinct: share of different token sequences among the generated ones.
        copies: share of generated token sequences that equal those of a training clip, as it is or in a training view.
        psnr: of the tokenizer on held-out clips in dB, mean over clips.
        prediction: PSNR in dB of the predicted frames of held-out clips, mean over clips.
        prediction_repeat: the same if the last given frame is repeated instead.
        prediction_black: the same for black frames; most of each real frame is black.
    """

    recognised: float
    recognised_real: float
    displacement: float
    displacement_real: float
    distinct: float
    copies: float
    psnr: float
    prediction: float
    prediction_repeat: float
    prediction_black: float


def load_clips(data: DataConfig) -> Clips:
    """All clips of ``data``, without augmentation."""
    batches = list(evaluation_loader(open_source(data), data))
    return Clips(torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches]))


class FrameClassifier(nn.Module):
    """A small convolutional network that finds a digit anywhere: frames (B, 1, H, W) to logits (B, 10)."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.features = nn.Sequential(
            nn.AdaptiveAvgPool2d(16),  # the original digits are 8x8 and span half of a frame's side: nothing is lost
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))

    @torch.no_grad()
    def accuracy(self, clips: Clips) -> float:
        """The share of frames that are assigned to the class of their clip."""
        frames, labels = clips.frames
        guesses = torch.cat([self(part).argmax(1) for part in frames.split(1024)])
        return float((guesses == labels).float().mean())


def fit_frame_classifier(
    clips: Clips, *, steps: int, seed: int = 0, batch_size: int = 64, lr: float = 3e-3
) -> FrameClassifier:
    """Train a classifier on the frames of real ``clips``, and return it in evaluation mode."""
    frames, labels = clips.frames
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = FrameClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(frames), (batch_size,))
            optimizer.zero_grad()
            F.cross_entropy(classifier(frames[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def centres(clips: Tensor) -> Tensor:
    """The digit's centre of mass (N, T, 2), as (row, column) in pixels, in clips (N, 1, T, H, W) in [-1, 1].

    Pixels darker than ``FLOOR`` have no mass; else a grey haze would pull the centre to the middle of the frame.
    """
    mass = ((clips[:, 0] + 1) / 2 - FLOOR).clamp_min(0)  # (N, T, H, W)
    total = mass.sum((2, 3)).clamp_min(1e-6)
    down, right = (torch.arange(side, dtype=mass.dtype) for side in mass.shape[2:])
    return torch.stack([(mass.sum(3) * down).sum(2) / total, (mass.sum(2) * right).sum(2) / total], -1)


def mean_displacement(clips: Tensor) -> float:
    """Mean pixels by which the centre of mass moves from one frame to the next, over frames and clips."""
    return float(centres(clips).diff(dim=1).norm(dim=-1).mean())


def prediction_psnr(real: Tensor, predicted: Tensor, given: int) -> float:
    """PSNR in dB of the frames after the first ``given``, mean over clips."""
    return float(psnr((real[:, :, given:] + 1) / 2, (predicted[:, :, given:] + 1) / 2).mean())


def repeat_given(real: Tensor, given: int) -> Tensor:
    """Clips of the first ``given`` real frames, followed by copies of the last of these."""
    chosen = np.minimum(np.arange(real.shape[2]), given - 1)
    return real[:, :, chosen]


def score_clips(
    generated: Clips,
    tokens: Tensor,
    prediction: tuple[Tensor, Tensor],
    *,
    given: int,
    classifier: FrameClassifier,
    tokenizer: Tokenizer,
    cache: TokenCache,
    train: Clips,
    test: Clips,
) -> ClipScores:
    """Score generated clips.

    Args:
        generated: with the classes asked for.
        tokens: (N, L) ids of ``generated``.
        prediction: held-out clips, and the predictions from their first ``given`` frames.
        classifier: trained on ``train``.
        tokenizer: for the PSNR, and for the tokens of the training clips as they are.
        cache: the generators' training tokens.
        train, test: real training clips and held-out clips.
    """
    repeats = repeated_ids(tokens, torch.cat([encode(tokenizer, train.pixels), cached_tokens(cache)]))
    whole, decoded = (test.pixels + 1) / 2, (reconstruct(tokenizer, test.pixels) + 1) / 2
    asked, predicted = prediction
    return ClipScores(
        recognised=classifier.accuracy(generated),
        recognised_real=classifier.accuracy(test),
        displacement=mean_displacement(generated.pixels),
        displacement_real=mean_displacement(test.pixels),
        distinct=repeats.distinct,
        copies=repeats.copies,
        psnr=float(psnr(whole, decoded).mean()),
        prediction=prediction_psnr(asked, predicted, given),
        prediction_repeat=prediction_psnr(asked, repeat_given(asked, given), given),
        prediction_black=prediction_psnr(asked, torch.full_like(asked, -1), given),
    )
