"""Every model that vistok has: sizes, parameters, official checkpoints, papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vistok.checkpoints import Model, registry
from vistok.types import TokenSpec


@dataclass(frozen=True)
class CatalogueEntry:
    """One model.

    Attributes:
        name: in configs.
        kind: tokenizer or generator.
        official: system/part, as `vistok convert` calls it.
        paper: its arXiv number.
        sizes: number of parameters by the name of the size; a generator's for the tokens that its paper models.
        checkpoints: ids of the released weights, which ``vistok.load`` and `vistok convert` read.
    """

    name: str
    kind: str
    official: str
    paper: str
    sizes: dict[str, int]
    checkpoints: tuple[str, ...]


def catalogue() -> list[CatalogueEntry]:
    """All models, in the registry's order; they are built without memory, on the meta device."""
    return [_describe(item) for item in registry.ENTRIES]


def _describe(item: registry.Entry) -> CatalogueEntry:
    model_class = item.load()
    build = model_class if item.kind == "tokenizer" else partial(model_class, _spec(item))
    sizes = {name: _parameters(build, arguments) for name, arguments in model_class.sizes.items()}
    checkpoints = tuple(checkpoint.id for _, checkpoint in item.released())
    return CatalogueEntry(item.name, item.kind, item.official, item.paper, sizes, checkpoints)


def _spec(item: registry.Entry) -> TokenSpec:
    """The tokens that a generator's paper models, at its tokenizer's default size."""
    with torch.device("meta"):
        return registry.entry(str(item.tokenizer), "tokenizer").load()().spec


def _parameters(build: Callable[..., Model], arguments: Mapping[str, Any]) -> int:
    with torch.device("meta"):
        model: Model = build(**arguments)
    return sum(parameter.numel() for parameter in model.parameters())
