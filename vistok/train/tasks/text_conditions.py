"""Texts as conditions of a tokenizer's decoder in training."""

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
    """The text guide of a run, or None; warns if the tokenizer can decode with texts, but the config has none."""
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
    """The condition of a batch, on the device of its pixels; one of several captions of an image is drawn."""
    return captions.condition(batch, keys.uniform("caption").cpu()).to(batch.pixels.device)
