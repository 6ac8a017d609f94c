"""The parts that each tokenizer names as those that its tokens depend on."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from support.tiny_models import names, pixels, tiny

from vistok.checkpoints import registry

RENDERING = [name for name in names("tokenizer") if registry.entry(name).load().renders]


@pytest.mark.parametrize("name", RENDERING)
def test_tokens_depend_on_nothing_else(name):
    tokenizer = tiny(name)
    images = pixels(tokenizer)
    with torch.no_grad():
        before, decoded = tokenizer.encode(images), tokenizer.reconstruct(images)
        kept = lambda key: any(fnmatchcase(key, part) for part in tokenizer.encoding_parts)  # noqa: E731
        others = [p for key, p in tokenizer.named_parameters() if not kept(key)]
        for parameter in others:
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(tokenizer.encode(images), before)
        assert not torch.equal(tokenizer.reconstruct(images), decoded)


@pytest.mark.parametrize("name", RENDERING)
def test_pixels_of_given_tokens_do_not_depend_on_them(name):
    """Decoding reads no encoding part but the codes; all else that it reads stays trainable."""
    tokenizer = tiny(name)
    with torch.no_grad():
        tokens = tokenizer.encode(pixels(tokenizer))
        decoded = tokenizer.decode(tokens)
        for key, parameter in tokenizer.named_parameters():
            if "quantizer." not in key and any(fnmatchcase(key, part) for part in tokenizer.encoding_parts):
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(tokenizer.decode(tokens), decoded)
