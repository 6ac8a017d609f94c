"""vistok: the toolkit for autoregressive visual generation.

Public names are imported on first use, so that ``import vistok`` takes almost no time.
"""

from __future__ import annotations

from importlib import import_module

from vistok._version import __version__

_PUBLIC = {
    "load": "vistok.checkpoints",
    "from_official": "vistok.checkpoints",
    "pipeline": "vistok.pipelines",
    "Pipeline": "vistok.pipelines",
    "TokenSpec": "vistok.types",
    "Condition": "vistok.types",
    "TokenChunk": "vistok.types",
    "Keys": "vistok.draws",
    "Tokenizer": "vistok.tokenizers.base",
    "Generator": "vistok.generators.base",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vistok' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
