"""Texts as conditions: ids from a text tokenizer, or features from a text encoder."""

from vistok.text.base import TextEncoder, TextError
from vistok.text.prompts import TEXT, PromptEncoder, copy_encoders, open_text_encoder, open_text_tokenizer

__all__ = [
    "TEXT",
    "PromptEncoder",
    "TextEncoder",
    "TextError",
    "copy_encoders",
    "open_text_encoder",
    "open_text_tokenizer",
]
