"""Patterns of parameter names in configs, with the syntax of file name patterns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from vistok.signatures import ConfigError


def matching(names: Collection[str], patterns: Iterable[str], key: str, what: str = "parameter") -> set[str]:
    """The names that match any of the patterns, as file names do: ``*`` matches anything.

    Args:
        key: of the config, for messages.
        what: bears the names, for messages.

    Raises:
        ConfigError: a pattern matches no name.
    """
    found = set()
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            tops = sorted({name.partition(".")[0] for name in names})
            raise ConfigError(f"{key}: no {what} is called {pattern!r}; their names begin with {', '.join(tops)}")
        found.update(fitting)
    return found
