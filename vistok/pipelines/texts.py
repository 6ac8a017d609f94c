"""Texts that a tokenizer's decoder reads, as the ``text`` section of a run's config describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from vistok.config import NOTHING, Allowed, override
from vistok.data.config import DataConfig
from vistok.data.loader import Source
from vistok.data.opening import open_source
from vistok.eval.tokenizers import BatchConditions
from vistok.pipelines.runs import config_of_run
from vistok.signatures import ConfigError, check, check_least
from vistok.text import PromptEncoder, open_text_encoder
from vistok.text.captions import CaptionReader
from vistok.tokenizers.base import Tokenizer
from vistok.types import FeatureSpec

TEXT_OVERRIDES = ("text.", "text=")
"""Prefixes of the overrides that apply to a ``text`` section."""


@dataclass(frozen=True)
class TextConfig:
    """The ``text`` section: how captions become features.

    Attributes:
        encoder: Hugging Face folder or name of a text encoder.
        length: the most features of a text.
        positions: ``text`` for the positions of the text, or ``all`` for all of a CLIP tower (see
            ``vistok.text.encoders.CLIPTower``).
    """

    encoder: str
    length: int = 77
    positions: Literal["text", "all"] = "all"

    def __post_init__(self) -> None:
        check_least(self, length=1)


@dataclass(frozen=True)
class _TextSection:
    """The section that ``text.…=…`` overrides apply to."""

    text: TextConfig | None


class TextGuide:
    """The captions of images as conditions of a tokenizer.

    Raises:
        ConfigError: the tokenizer reads no text features, or others than the encoder makes.
        TextError: the encoder is not found.
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
        """A reader of the captions of ``source``."""
        return CaptionReader(source, self._captions, self._text, refuse_long=False)


def text_of_run(
    path: str | Path, tokenizer: Tokenizer, overrides: Sequence[str] = (), *, allowed: Allowed = NOTHING
) -> TextConfig | None:
    """The ``text`` section that a tokenizer was trained with, changed by ``text.…=…`` overrides.

    Returns:
        None if the tokenizer reads no texts, was trained without texts, or the override is ``text=null``.

    Raises:
        ConfigError: there are overrides but the tokenizer reads no texts, or a key is unknown.
        ValueError: the tokenizer reads texts, but ``path`` is no run that records their encoder.
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
    """The tokenizer's conditions for the images of ``data``: the first caption of each image.

    Images without a caption are decoded without one. Returns None if ``config`` is None.
    """
    if config is None:
        return None
    captions = TextGuide(config, tokenizer, data.captions).reader(open_source(data))
    return lambda batch: captions.condition(batch, torch.zeros(len(batch.indices)))


def check_needs_no_text(path: str | Path, tokenizer: Tokenizer, what: str) -> None:
    """Raise ValueError if the tokenizer decodes with texts, which ``what`` (a noun for the message) does not have."""
    if tokenizer.condition_spec.features is None or text_of_run(path, tokenizer) is None:
        return
    raise ValueError(
        f"{path} decodes with texts, and {what} have none: its reconstructions without them would be worse than it can "
        f"do. Score it on images with captions (vistok eval {path} data.root=…), or give texts from Python: "
        "tokenizer.reconstruct(pixels, condition=…)"
    )
