"""Guards for untrusted YAML files that OmegaConf reads: against calls of resolvers and endless expansion of aliases.

OmegaConf treats texts with ``${`` as references: ``${a.b}`` to another key, ``${name:…}`` to a resolver (a function).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MOST_NODES = 1_000_000
"""The most values of a YAML file with aliases expanded; a few lines of nested aliases could fill the memory."""


def calls_resolver(text: str) -> bool:
    from omegaconf.errors import OmegaConfBaseException
    from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

    def has_resolver(node: Any) -> bool:
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            return True
        return any(map(has_resolver, getattr(node, "children", None) or ()))

    try:
        return has_resolver(parse(text))
    except OmegaConfBaseException:
        return True  # OmegaConf cannot parse it, so refuse it


def check_size(root: Any) -> None:
    """Raise ValueError if a YAML document is too large, or endless, once its aliases are expanded."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise ValueError("an alias leads back to itself")
            return sizes[id(node)]
        sizes[id(node)] = -1
        children = node.value if isinstance(node.value, list) else ()
        inner = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = total = 1 + sum(map(size, inner))
        if total > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES:,} values, aliases written out")
        return total

    if root is not None:
        size(root)


_REFERENCE = re.compile(r"(\\*)\$\{")


def escape(text: str) -> str:
    """``text`` with every ``${`` escaped, so that OmegaConf reads no reference."""
    return _REFERENCE.sub(r"\1\1\\${", text)


def escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [escaped(item) for item in value]
    return escape(value) if isinstance(value, str) else value
