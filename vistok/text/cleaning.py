"""Captions as LlamaGen's text encoder reads them: cleaned as DeepFloyd's IF cleans prompts."""

from __future__ import annotations

from vistok.text.base import TextError

ROUNDS = 2
"""A second round meets what the first one unwraps, such as marks that were written as entities."""


def clean_caption(text: str) -> str:
    """A caption in lower case, without addresses, markup, file names, long numbers and odd signs.

    Raises:
        TextError: ``ftfy`` or ``beautifulsoup4`` is not installed.
    """
    try:
        import bs4  # noqa: F401  # without them diffusers would leave captions as they are, and say so in a log
        import ftfy  # noqa: F401
        from diffusers import IFPipeline
    except ImportError as error:
        raise TextError("cleaning captions needs `ftfy` and `beautifulsoup4`; pip install 'vistok[text]'") from error
    for _ in range(ROUNDS):
        # The method reads nothing but constants of its class, and a pipeline would need its weights.
        text = IFPipeline._clean_caption(IFPipeline, text)
    return text
