"""Texts that a tokenizer's decoder reads in training."""

from __future__ import annotations

import logging

from vistok.data.batches import ImageBatch
from vistok.data.config import DataConfig
from vistok.draws import Keys
from vistok.pipelines.texts import TextConfig, TextGuide
from vistok.text.captions import CaptionReader
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition

log = logging.getLogger(__name__)


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
