"""Texts that a tokenizer's decoder reads: what a run's ``text`` section says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from vistok.config import NOTHING, Allowed, ConfigError, check, check_least, override
from vistok.data.config import DataConfig
from vistok.data.loader import Source
from vistok.data.opening import open_source
from vistok.eval.tokenizers import BatchConditions
from vistok.pipelines.runs import config_of_run
from vistok.text import PromptEncoder, open_text_encoder
from vistok.text.captions import CaptionReader
from vistok.tokenizers.base import Tokenizer
from vistok.types import FeatureSpec

TEXT_OVERRIDES = ("text.", "text=")
"""How the overrides begin that apply to a ``text`` section."""


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


@dataclass(frozen=True)
class _TextSection:
    """What ``text.…=…`` overrides apply to."""

    text: TextConfig | None


class TextGuide:
    """The captions of images as conditions of a tokenizer.

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


def text_of_run(
    path: str | Path, tokenizer: Tokenizer, overrides: Sequence[str] = (), *, allowed: Allowed = NOTHING
) -> TextConfig | None:
    """What a tokenizer's texts were encoded by in its training, as ``text.…=…`` overrides change it.

    Returns:
        None for a tokenizer that reads no texts, or saw none in its training, or with the override ``text=null``.

    Raises:
        ConfigError: texts for a tokenizer that reads none, or an unknown key.
        ValueError: a tokenizer that reads texts and is not a run, so that nothing says what encodes them.
    """
    section, config = None, config_of_run(path)
    if tokenizer.condition_spec.features is None:
        if overrides:
            raise ConfigError(f"{overrides[0]}: {type(tokenizer).__name__} reads no text; leave it out")
        return None
    if config is not None:
        section = config.get("text")
    elif not overrides:
        raise ValueError(
            f"{type(tokenizer).__name__} decodes with texts, and {path} is no run that says what encoded them: name "
            "that text encoder with text.encoder=… (text.length=… and text.positions=… as in its training), or decode "
            "without texts with text=null"
        )
    values = override({"text": section}, overrides, source=str(path), target=_TextSection, allowed=allowed)["text"]
    return None if values is None else TextConfig(**check(TextConfig, values, "text"))


def conditions_of(config: TextConfig | None, tokenizer: Tokenizer, data: DataConfig) -> BatchConditions | None:
    """What a tokenizer is told of the images of ``data``: of several captions of an image the first. Images without a
    caption are decoded without one. None tells it nothing."""
    if config is None:
        return None
    captions = TextGuide(config, tokenizer, data.captions).reader(open_source(data))
    return lambda batch: captions.condition(batch, torch.zeros(len(batch.indices)))


def check_needs_no_text(path: str | Path, tokenizer: Tokenizer, what: str) -> None:
    """Raise ValueError where a tokenizer decodes with texts and ``what`` it is to decode has none."""
    if tokenizer.condition_spec.features is None or text_of_run(path, tokenizer) is None:
        return
    raise ValueError(
        f"{path} decodes with texts, and {what} have none: its reconstructions without them would be worse than it can "
        f"do. Score it on images with captions (vistok eval {path} data.root=…), or give texts from Python: "
        "tokenizer.reconstruct(pixels, condition=…)"
    )
