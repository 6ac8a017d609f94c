"""Texts that a tokenizer's decoder reads in training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, cast

from vistok.config import ConfigError, check_least
from vistok.data.batches import ImageBatch
from vistok.data.config import DataConfig
from vistok.data.loader import Source
from vistok.draws import Keys
from vistok.text import PromptEncoder, open_text_encoder
from vistok.tokenizers.base import Tokenizer
from vistok.train.captions import CaptionReader
from vistok.types import Condition, FeatureSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConfig:
    """The ``text`` section: what makes features of captions.

    Attributes:
        encoder: a text encoder of Hugging Face, by folder or name.
        length: the most features of a text.
        positions: those of the text, or ``all``, of CLIP's towers (see ``vistok.text.encoders.CLIPTower``).
    """

    encoder: str
    length: int = 77
    positions: Literal["text", "all"] = "all"

    def __post_init__(self) -> None:
        check_least(self, length=1)


class TextGuide:
    """The captions of a run's images as conditions of its tokenizer.

    Raises:
        ConfigError: a tokenizer that reads no features, or others.
        TextError: no such encoder.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, captions: Literal["own", "class_names"]):
        taken = tokenizer.condition_spec.features
        if taken is None:
            raise ConfigError(f"text: {type(tokenizer).__name__} reads no text; leave the section out")
        encoder = open_text_encoder(config.encoder, config.length, config.positions)
        made = cast(FeatureSpec, encoder.spec)
        if made != taken:
            raise ConfigError(
                f"text: {config.encoder} makes {made.length} features of {made.dim} channels, but the "
                f"tokenizer reads {taken.length} of {taken.dim}; see model.text_length, model.text_dim and text.length"
            )
        self.network: Any = encoder.network
        self._text, self._captions = PromptEncoder([encoder]), captions

    def reader(self, source: Source) -> CaptionReader:
        """The captions of a source."""
        return CaptionReader(source, self._captions, self._text, refuse_long=False)


def text_guide(config: TextConfig | None, tokenizer: Tokenizer, data: DataConfig) -> TextGuide | None:
    """The guide of a run, which warns where a tokenizer would read texts and gets none."""
    if config is not None:
        return TextGuide(config, tokenizer, data.captions)
    if tokenizer.condition_spec.parts:
        log.warning(
            "%s decodes with texts, but the config has no text section: it will see none; name an encoder, "
            "text.encoder=…",
            type(tokenizer).__name__,
        )
    return None


def text_of(batch: ImageBatch, captions: CaptionReader, keys: Keys) -> Condition:
    """The condition of a batch, where its pixels are; of several captions of an image one is drawn."""
    return captions.condition(batch, keys.uniform("caption").cpu()).to(batch.pixels.device)
