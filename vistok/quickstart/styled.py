"""Digits in four styles (plain, slanted, thin, bold) and conversations about them, as a token cache for training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistok.data.captions import spell_digit
from vistok.data.config import Affine, DataConfig
from vistok.data.digit_variants import STYLES
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.data.ragged import Piece
from vistok.data.token_writer import TokenWriter
from vistok.data.tokens import TokenCache
from vistok.data.transforms import random_affine
from vistok.draws import Keys
from vistok.pipelines.folders import TOKENIZER
from vistok.quickstart.scores import CLASSES, Digits, encode
from vistok.text import TEXT, PromptEncoder
from vistok.tokenizers.base import Tokenizer
from vistok.types import ConditionSpec, FeatureSpec

BEFORE = 2
"""Earlier digits in a conversation."""
STYLE_NAMES = tuple(style.words or "plain" for style in STYLES)


@dataclass(frozen=True)
class StyledDigits(Digits):
    """Digits with their styles: ``styles`` (N,) int64, indices into ``STYLE_NAMES``."""

    styles: Tensor

    def by_style(self) -> Digits:
        """The same images, with their styles as labels."""
        return Digits(self.pixels, self.styles)

    def at(self, rows: Tensor) -> StyledDigits:
        return StyledDigits(self.pixels[rows], self.labels[rows], self.styles[rows])


@cache
def load_styled(split: str) -> StyledDigits:
    """scikit-learn's digits at 32x32 in all styles: "train" (5,732) or "test" (1,456)."""
    config = DataConfig(image_size=32, source="digits", name="styled", split=split, channels=1, batch_size=512)
    batches = list(evaluation_loader(open_source(config), config))
    labels = torch.cat([batch.labels for batch in batches])
    styles = torch.cat([batch.indices for batch in batches]) % len(STYLES)
    return StyledDigits(torch.cat([batch.pixels for batch in batches]), labels, styles)


def draw_request(digit: int) -> str:
    """ "draw a seven" """
    return f"draw {spell_digit(digit)[0]}"


def edit_request(digit: int) -> str:
    """ "now a seven" """
    return f"now {spell_digit(digit)[0]}"


def word(digit: int) -> str:
    """ "seven" """
    return spell_digit(digit)[1]


def write_conversations(
    tokenizer: Tokenizer, data: DataConfig, out: Path, *, views: int, text: PromptEncoder
) -> TokenCache:
    """Write a token cache of conversations in which a digit is drawn and changed twice, in one style.

    Each sample is the last digit of such a conversation. Its condition ``given`` holds the tokens of the two digits
    before it, in the order second, first.

    The texts of a sample are, by number: 0, 1 and 2 the requests to draw its digit and to change another digit into it,
    and the digit's name; 3 and 4 the requests to draw the second digit and to change another digit into it; 5 the
    request to draw the first digit.

    Args:
        data: digits in all styles; ``affine`` and ``seed`` are those of the views.
        views: rotated, shifted and scaled versions of each digit. The digits before it have the same classes in every
            view, but are different images.
    """
    digits = load_styled("train" if data.split is None else data.split)
    count, affine = len(digits), data.affine or Affine()
    tokens = torch.stack([encode(tokenizer, _augmented(digits.pixels, affine, data.seed, v)) for v in range(views)], 1)
    partners, before = _partners(digits, views, data.seed)
    spec = tokenizer.spec
    length = BEFORE * spec.length
    condition = ConditionSpec(ids=text.spec.ids, given=FeatureSpec(spec.dim, length))
    with TokenWriter(
        out,
        asdict(spec),
        tokenizer.fingerprint(),
        views=views,
        condition=condition,
        text=text.identities,
        feature_dtype="float32",
    ) as writer:
        said = [
            [draw_request(digit), edit_request(digit), word(digit)]
            + [draw_request(second), edit_request(second), draw_request(first)]
            for digit, (second, first) in zip(digits.labels.tolist(), before.tolist())
        ]
        pieces = iter(text.encode([line for lines in said for line in lines], refuse_long=True)["ids"])
        ids = [[next(pieces) for _ in lines] for lines in said]
        given = [
            [Piece(tokens[places, view].flatten(0, 1).numpy(), length) for view, places in enumerate(row)]
            for row in partners
        ]
        writer.write(tokens, torch.full((count,), -1), {"ids": ids, "given": given})
        tokenizer.save_pretrained(writer.folder / TOKENIZER)
        text.save(writer.folder / TEXT)
    return TokenCache(out)


def _augmented(pixels: Tensor, affine: Affine, seed: int, view: int) -> Tensor:
    return random_affine(pixels, affine, Keys.range(seed, len(pixels), step=view).uniform("affine", 4))


def _partners(digits: StyledDigits, views: int, seed: int) -> tuple[Tensor, Tensor]:
    """The digits before each digit in its conversation, the directly preceding one first.

    Returns:
        Indices (N, views, BEFORE) of digits in the same style, and their classes (N, BEFORE). Consecutive digits differ
        in class.
    """
    uniforms = Keys.range(seed, len(digits)).uniform("partners", BEFORE, 1 + views).numpy()
    labels, styles = digits.labels.numpy(), digits.styles.numpy()
    partners = np.empty((len(digits), views, BEFORE), np.int64)
    others, after = np.empty((len(digits), BEFORE), np.int64), labels
    for turn in range(BEFORE):
        after = others[:, turn] = (after + 1 + (uniforms[:, turn, 0] * (CLASSES - 1)).astype(np.int64)) % CLASSES
        for style in range(len(STYLES)):
            for label in range(CLASSES):
                there = np.flatnonzero((labels == label) & (styles == style))
                rows = np.flatnonzero((after == label) & (styles == style))
                partners[rows, :, turn] = there[(uniforms[rows, turn, 1:] * len(there)).astype(np.int64)]
    return torch.from_numpy(partners), torch.from_numpy(others)
