"""Scores of generated digits, by a small classifier that was trained on real digits only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.data.config import Affine, DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.data.tokens import TokenCache
from vistok.data.transforms import random_affine
from vistok.eval.metrics import Moments, frechet_distance
from vistok.eval.reconstruction import psnr
from vistok.tokenizers.base import Tokenizer

CLASSES = 10
AUGMENTATION = Affine(degrees=10, translate=0.06, scale=0.1)
# The definition of a copy.
COPIES_OF_IDS = "equal to the tokens of a training digit as it is, or of any view that the generator trained on"
COPIES_OF_LATENTS = (
    "as close to the latents of a training digit, as it is or in a view that the generator trained on, as a held-out "
    "digit's latents are to those of its own reconstruction (median)"
)


@dataclass(frozen=True)
class Digits:
    """Images, each with the class that it shows, or that was asked for.

    Attributes:
        pixels: (N, 1, 32, 32) in [-1, 1].
        labels: (N,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first_of_each_class(self, counts: Tensor) -> Digits:
        """The first ``counts[c]`` images of every class c."""
        rows = torch.cat([(self.labels == label).nonzero()[: int(count), 0] for label, count in enumerate(counts)])
        return Digits(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class DigitScores:
    """The quickstart's scores; shares are in [0, 1].

    Attributes:
        recognised: share of generated digits that the classifier assigns to the class asked for.
        recognised_real: share of held-out real digits that it classifies correctly.
        frechet: Frechet distance, on the classifier's features, between generated and training digits.
        frechet_real: the same for held-out digits, as many of each class.
        distinct: share of different token sequences among the generated ones.
        copies: share of generated token sequences that equal those of a training digit, as it is or in a training view.
            For ``distinct`` and ``copies``, two sequences of continuous tokens are equal if they lie within
            ``round_trip_error`` of each other.
        psnr: of the tokenizer on held-out digits in dB, mean over images.
    """

    recognised: float
    recognised_real: float
    frechet: float
    frechet_real: float
    distinct: float
    copies: float
    psnr: float


def load_digits(split: str) -> Digits:
    """scikit-learn's digits at 32x32: "train" (1,433) or "test" (364, the last fifth of each class)."""
    config = DataConfig(image_size=32, source="digits", split=split, channels=1, batch_size=512)
    batches = list(evaluation_loader(open_source(config), config))
    return Digits(torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches]))


class DigitClassifier(nn.Module):
    """A two-layer convolutional network: pixels (B, 1, 32, 32) to logits (B, classes)."""

    def __init__(self, classes: int = CLASSES, width: int = 24, feature_dim: int = 64):
        super().__init__()
        self.features = nn.Sequential(
            nn.AvgPool2d(2),  # the original digits are 8x8: 16x16 loses nothing
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, feature_dim),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(feature_dim, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(pixels)))

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """The likeliest class of each image, (B,)."""
        return self(pixels).argmax(1)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        return float((self(digits.pixels).argmax(1) == digits.labels).float().mean())

    @torch.no_grad()
    def moments(self, digits: Digits) -> Moments:
        """Moments of the features before the last layer."""
        return Moments.of(self.features(digits.pixels))


def fit_classifier(
    digits: Digits, *, steps: int, seed: int = 0, batch_size: int = 64, lr: float = 2e-3, classes: int = CLASSES
) -> DigitClassifier:
    """Train a classifier on slightly rotated, shifted and scaled ``digits``, and return it in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier(classes)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(digits), (batch_size,))
            pixels = random_affine(digits.pixels[rows], AUGMENTATION, torch.rand(batch_size, 4))
            optimizer.zero_grad()
            F.cross_entropy(classifier(pixels), digits.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def score(
    generated: Digits,
    tokens: Tensor,
    *,
    classifier: DigitClassifier,
    tokenizer: Tokenizer,
    cache: TokenCache,
    train: Digits,
    test: Digits,
) -> DigitScores:
    """Score generated digits.

    Args:
        generated: with the classes asked for.
        tokens: (N, L) ids or (N, L, D) latents of ``generated``.
        classifier: trained on ``train``.
        tokenizer: for the PSNR, and for the tokens of the training digits as they are.
        cache: the generator's training tokens.
        train, test: real training digits and held-out digits.
    """
    counts = equal_counts(generated, test)
    reference = classifier.moments(train).gaussian

    def frechet(digits: Digits) -> float:
        return frechet_distance(classifier.moments(digits.first_of_each_class(counts)).gaussian, reference)

    known = torch.cat([encode(tokenizer, train.pixels), cached_tokens(cache)])
    if tokenizer.spec.discrete:
        repeats = repeated_ids(tokens, known)
    else:
        repeats = repeated_latents(tokens, known, tolerance=round_trip_error(tokenizer, test.pixels))
    return DigitScores(
        recognised=classifier.accuracy(generated),
        recognised_real=classifier.accuracy(test),
        frechet=frechet(generated),
        frechet_real=frechet(test),
        distinct=repeats.distinct,
        copies=repeats.copies,
        psnr=reconstruction_psnr(tokenizer, test.pixels),
    )


def equal_counts(a: Digits, b: Digits) -> Tensor:
    """For each class, the smaller of the numbers of digits in both sets: (10,)."""
    return torch.minimum(*(torch.bincount(digits.labels, minlength=CLASSES) for digits in (a, b)))


@dataclass(frozen=True)
class Repeats:
    """Shares of token sequences, in [0, 1].

    Attributes:
        distinct: sequences that equal no earlier one.
        copies: sequences that equal a known one.
    """

    distinct: float
    copies: float


def repeated_ids(ids: Tensor, known: Tensor) -> Repeats:
    """Repeats among ids (N, L), given known ids (M, L)."""
    rows, old = list(map(tuple, ids.tolist())), set(map(tuple, known.tolist()))
    return Repeats(len(set(rows)) / len(rows), sum(row in old for row in rows) / len(rows))


def repeated_latents(latents: Tensor, known: Tensor, *, tolerance: float) -> Repeats:
    """Repeats among latents (N, L, D), given known latents (M, L, D).

    Two sequences count as equal if their Euclidean distance is at most ``tolerance``.
    """
    flat, old = latents.float().flatten(1), known.float().flatten(1)
    close = torch.cdist(flat, flat) <= tolerance
    copied = torch.cat([(torch.cdist(part, old) <= tolerance).any(1) for part in flat.split(100)])
    return Repeats(1 - close.tril(-1).any(1).float().mean().item(), copied.float().mean().item())


def round_trip_error(tokenizer: Tokenizer, pixels: Tensor) -> float:
    """Median distance between an image's latents and those of its reconstruction. Closer latents look the same."""
    latents, again = encode(tokenizer, pixels), encode(tokenizer, reconstruct(tokenizer, pixels))
    return float((latents - again).float().flatten(1).norm(dim=1).median())


def cached_tokens(cache: TokenCache) -> Tensor:
    """The tokens of all views in a cache, (views x N, L[, D]); if it holds moments, their means."""
    rows = range(len(cache))
    views = [cache.batch(rows, [view] * len(cache))[0] for view in range(cache.views)]
    return torch.cat([tokens.chunk(2, -1)[0] if cache.content == "moments" else tokens for tokens in views])


def encode(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    return _in_parts(tokenizer, tokenizer.encode, pixels)


def decode(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    return _in_parts(tokenizer, tokenizer.decode, tokens)


def reconstruct(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    return _in_parts(tokenizer, tokenizer.reconstruct, pixels)


@torch.no_grad()
def _in_parts(tokenizer: Tokenizer, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The result of ``work``, computed on some rows at a time on the tokenizer's device."""
    device = tokenizer.device
    return torch.cat([work(part.to(device)).cpu() for part in rows.split(256)])


def reconstruction_psnr(tokenizer: Tokenizer, pixels: Tensor) -> float:
    return float(psnr((pixels + 1) / 2, (reconstruct(tokenizer, pixels) + 1) / 2).mean())


def nearest(images: Tensor, among: Tensor) -> Tensor:
    """For each of ``images`` (N, C, H, W), the index (N,) of the nearest image ``among`` (M, C, H, W), by pixels."""
    return torch.cdist(images.flatten(1), among.flatten(1)).argmin(1)
