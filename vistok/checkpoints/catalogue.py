"""The catalogue of all models: sizes, parameters, official checkpoints, papers, licences.

``vistok models`` reads them from ``catalogue.json``, which this module writes:

    python -m vistok.checkpoints.catalogue
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from vistok.checkpoints import Model, registry
from vistok.types import TokenSpec
from vistok.utils.files import write_json

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class ReleasedFile:
    """One official checkpoint.

    Attributes:
        id: as ``vistok.load`` takes it.
        official: "system/part" of the model that the file holds.
        tokenizer: id of the tokenizer that a generator was trained with, or None.
        licence: of the weights, as their repository states it.
    """

    id: str
    official: str
    tokenizer: str | None
    licence: str


@dataclass(frozen=True)
class CatalogueEntry:
    """One model.

    Attributes:
        name: the model's name in configs.
        kind: tokenizer or generator.
        official: "system/part", as `vistok convert` takes it.
        paper: the arXiv number.
        tokenizer: of a generator: the name in configs of the tokenizer whose tokens the paper models.
        licence: of the reference implementation's code.
        sizes: number of parameters by the name of the size; for a generator, with the tokens that its paper models.
        checkpoints: the released weights.
    """

    name: str
    kind: str
    official: str
    paper: str
    tokenizer: str | None
    licence: str
    sizes: dict[str, int]
    checkpoints: tuple[ReleasedFile, ...]


def catalogue() -> list[CatalogueEntry]:
    """All models, in the registry's order; they are built on the meta device, which takes no memory."""
    return [_describe(item) for item in registry.ENTRIES]


def _describe(item: registry.Entry) -> CatalogueEntry:
    model_class: Any = item.load()
    build: Callable[..., Model] = model_class if item.kind == "tokenizer" else partial(_generator, item)
    sizes = {name: _parameters(build, arguments) for name, arguments in model_class.sizes.items()}
    checkpoints = tuple(
        ReleasedFile(
            checkpoint.id, official, checkpoint.tokenizer, checkpoint.licence or item.licence_of(official).weights
        )
        for official, checkpoint in item.released()
    )
    return CatalogueEntry(
        item.name, item.kind, item.official, item.paper, item.tokenizer, item.licence.code, sizes, checkpoints
    )


def _generator(item: registry.Entry, **arguments: Any) -> Model:
    return item.load()(_spec(item.tokenizer), **arguments)


@cache
def _spec(tokenizer: str) -> TokenSpec:
    """The tokens that a generator's paper models: those of the tokenizer's default size."""
    with torch.device("meta"):
        return registry.entry(tokenizer, "tokenizer").load()().spec


def _parameters(build: Callable[..., Model], arguments: Mapping[str, Any]) -> int:
    with torch.device("meta"):
        model: Model = build(**arguments)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    write_json(FILE, [asdict(item) for item in catalogue()])
