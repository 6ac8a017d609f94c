"""Cleaning of captions for LlamaGen's text encoder, by DeepFloyd IF's rules for prompts."""

from __future__ import annotations

from vistok.text.base import TextError

ROUNDS = 2
"""The second round cleans what the first one reveals, such as markup that was written as HTML entities."""


def clean_caption(text: str) -> str:
    """A caption in lower case, without addresses, markup, file names, long numbers and unusual characters.

    Raises:
        TextError: ``ftfy`` or ``beautifulsoup4`` is not installed.
    """
    try:
        import bs4  # noqa: F401  # without bs4 and ftfy, diffusers would only log a warning and not clean
        import ftfy  # noqa: F401
        from diffusers import IFPipeline
    except ImportError as error:
        raise TextError("cleaning captions needs `ftfy` and `beautifulsoup4`; pip install 'vistok[text]'") from error
    for _ in range(ROUNDS):
        # The method reads only constants of its class, and an instance of the pipeline would need its weights.
        text = IFPipeline._clean_caption(IFPipeline, text)
    return text
