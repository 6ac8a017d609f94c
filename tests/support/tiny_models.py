"""One tiny model of every registered name, with random weights; tests of contracts run over all of them.

Their arguments are the models' own, ``Model.tiny``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.generators.base import Generator
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.queries import QueryGenerator
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition, TokenSpec

RASTER = TokenSpec(16, 32, dim=4, grid=(4, 4))
ARGUMENTS: dict[str, Mapping[str, Any]] = {entry.name: entry.load().tiny for entry in registry.ENTRIES}
VIT = ARGUMENTS["vit_vqgan"]["encoder"]


def official_vit_config(size: dict[str, int]) -> dict[str, int]:
    """The reference's names for the size of a ViT-VQGAN transformer."""
    return {"dim": size["dim"], "depth": size["num_layers"], "heads": size["num_heads"], "mlp_dim": size["mlp_dim"]}


def names(kind: str) -> list[str]:
    """The registered tokenizers or generators."""
    return [entry.name for entry in registry.ENTRIES if entry.kind == kind]


def next_token_generators() -> list[str]:
    """The generators that predict one id after another, each as a whole."""
    kinds = {name: registry.entry(name).load() for name in names("generator")}
    return [
        name
        for name, kind in kinds.items()
        if issubclass(kind, AutoregressiveGenerator)
        and not issubclass(kind, QueryGenerator)
        and not kind.needs_tokenizer
        and not draws_parts(kind)
    ]


def draws_parts(kind: type[Generator]) -> bool:
    """Whether a generator draws ids in parts."""
    return kind(**kind.tiny).num_parts > 1


def single_token_generators() -> dict[str, dict[str, Any]]:
    """The generators that can generate token by token in raster order, with the arguments for it."""
    found = {}
    for name in next_token_generators():
        model_class = registry.entry(name).load()
        found[name] = {"window": 1} if "window" in inspect.signature(model_class).parameters else {}
    return found


def tiny(name: str, **arguments: Any) -> Tokenizer | Generator:
    """The tiny model of a registered name, in eval mode; ``arguments`` replace some of its own."""
    with torch.random.fork_rng(devices=[]):  # frozen weights keep these values
        torch.manual_seed(0)
        model = registry.entry(name).load()(**ARGUMENTS[name] | arguments)
    return randomise(model).eval()


def in_loop(model: Tokenizer | Generator) -> dict[str, Tokenizer]:
    """The argument ``tokenizer`` of a generator that needs one, the tiny one of its system; else nothing."""
    if not isinstance(model, Generator) or not model.needs_tokenizer:
        return {}
    tokenizer = tiny(registry.entry(model.registry_name).tokenizer).requires_grad_(False)
    return {"tokenizer": tokenizer.to(next(model.parameters()).device)}


def randomise(model: nn.Module) -> nn.Module:
    """Give every trained parameter random values: parameters that start at zero would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                offset = 1.0 if parameter.ndim == 1 else 0.0
                parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model


def pixels(tokenizer: Tokenizer, batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Random images (B, C, H, W) in [-1, 1] for a tokenizer."""
    return Keys.range(seed, batch).uniform("pixels", *tokenizer.input_shape) * 2 - 1


def token_ids(generator: Generator, batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Random ids (B, L) for a generator."""
    uniforms = Keys.range(seed, batch).uniform("tokens", generator.spec.length)
    return (uniforms * generator.spec.codebook_size).long()


def training_loss(model: Tokenizer | Generator) -> torch.Tensor:
    """The sum of all losses of a tiny model on one batch of random data."""
    torch.manual_seed(0)
    draws = model.training_draws(Keys.range(0, 3))
    if isinstance(model, Tokenizer):
        output = model(pixels(model), draws=draws)
        terms = [term.mean() for term in output.losses.values()]
        return sum(terms if output.reconstruction is None else [*terms, output.reconstruction.square().mean()])
    spec = model.spec
    tokens = token_ids(model) if spec.discrete else Keys.range(0, 3).normal("x", spec.length, spec.dim)
    return model(tokens, labels(0, 1, 2), draws=draws, **in_loop(model)).loss


def labels(*classes: int) -> Condition:
    return Condition.from_labels(torch.tensor(classes))


CAPTIONS = {"caption_dim": 6, "caption_length": 5}
"""Arguments of a tiny Llama that takes captions."""


def captions(batch: int = 3) -> Condition:
    """Left-padded captions of 5, 4, 3, ... valid positions."""
    features = Keys.range(1, batch).normal("caption", 5, 6)
    mask = torch.arange(5) >= torch.arange(batch)[:, None]
    return Condition.from_features(features, mask)
