"""The term of a tokenizer's objective that contrasts images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.data.captions import class_caption
from vistok.draws import Draws
from vistok.losses import symmetric_cross_entropy
from vistok.signatures import ConfigError, check_least
from vistok.text import open_text_encoder
from vistok.tokenizers.base import Tokenizer
from vistok.train.tasks.terms import Term, TermConfig
from vistok.types import Clock, FeatureSpec, TokenizerOutput


@dataclass(frozen=True)
class TextContrastConfig(TermConfig):
    """Contrastive training with texts: SEED's first stage (arXiv 2307.08041, section 3.1).

    Attributes:
        encoder: folder or hub name of a text encoder, for example an unpacked MiniLM; the mean of its states stands for
            a text.
        feature: the tokenizer's feature; its last position stands for an image.
        dim: channels to which both are projected.
        temperature: initial temperature of the inner products; it is trained.
        label_smoothing: of the cross entropies.
        text_length: the most tokens of a text.
    """

    encoder: str = ""
    feature: str = "queries"
    dim: int = 256
    temperature: float = 0.07
    label_smoothing: float = 0.1
    text_length: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, dim=1, text_length=1)
        if self.weight and not self.encoder:
            raise ValueError("encoder is missing: the folder of a text encoder, such as an unpacked MiniLM")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")


class TextContrastTerm(Term):
    """Contrastive loss between images and texts, in both directions.

    The texts are the names of the classes, so several pairs of a batch can have the same text. The target is then
    spread evenly over them.
    """

    config_type = TextContrastConfig
    config: TextContrastConfig
    reads_labels = True
    texts: Tensor

    def __init__(self, name: str, config: TextContrastConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        known = tokenizer.summary_features
        if config.feature not in known:
            raise ConfigError(
                f"losses.{name}.feature: {type(tokenizer).__name__} names no feature {config.feature!r} that stands "
                f"for a whole image; it has {', '.join(known)}"
            )
        self._encoder = open_text_encoder(config.encoder, config.text_length)
        self.image_projection = nn.Linear(known[config.feature], config.dim)
        self.text_projection = nn.Linear(cast(FeatureSpec, self._encoder.spec).dim, config.dim)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.register_buffer("texts", torch.empty(0), persistent=False)

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return bool(tokenizer.summary_features)

    def prepare(self, classes: Sequence[str]) -> None:
        """Encode the names of the classes, once."""
        if not classes:
            raise ConfigError(f"losses.{self.name} compares images with the names of their classes, and there are none")
        names = [(*class_caption(name), name)[0] for name in classes]
        means = [torch.from_numpy(np.asarray(piece.values)).float().mean(0) for piece in self._encoder.encode(names)]
        self.texts = torch.stack(means)  # (K, channels of the encoder)

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        labels = output.features["labels"]
        known = labels >= 0
        images = F.normalize(self.image_projection(output.features[self.config.feature][known, -1].float()), dim=-1)
        texts = F.normalize(self.text_projection(self.texts[labels[known]]), dim=-1)
        return contrast(images @ texts.T / self.temperature, labels[known], self.config.label_smoothing)


def contrast(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy of the rows and the columns of logits (B, B) between images and texts.

    The target of each is spread evenly over all entries with the same label (B,).
    """
    if not len(labels):
        return logits.sum()  # 0, with a gradient
    alike = (labels[:, None] == labels).to(logits)
    wanted = alike / alike.sum(1, keepdim=True)
    return symmetric_cross_entropy(logits, wanted, label_smoothing=label_smoothing)
